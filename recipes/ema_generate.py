"""Sample answers to question sets.

tune run [--nproc_per_node N] recipes/ema_generate.py --config configs/NAME.yaml [key=value]
"""

import sys

from emarecipes.generation.run import run_generate

if __name__ == "__main__":
    sys.exit(run_generate(sys.argv[1:]))
