"""Store the reference's hidden states of a training config's rows ahead of its runs.

tune run [--nproc_per_node N] recipes/ema_cache.py --config configs/smollm2_135m_kl.yaml \
  reference_cache=cache
"""

import sys

from emarecipes.training import run_cache

if __name__ == "__main__":
    sys.exit(run_cache(sys.argv[1:]))
