"""Project a finished adapter onto what alignment changed (SafeLoRA), and report module by module.

tune run recipes/ema_safelora.py --config configs/smollm2_135m_safelora_posthoc.yaml [key=value]
"""

import sys

from emarecipes.defenses.safelora_run import run_safelora

if __name__ == "__main__":
    sys.exit(run_safelora(sys.argv[1:]))
