"""Fine-tune one LoRA adapter under the defenses that the config names.

tune run [--nproc_per_node N] recipes/ema_lora.py --config configs/smollm2_135m_kl.yaml [key=value]
"""

import sys

from emarecipes.training import run_lora

if __name__ == "__main__":
    sys.exit(run_lora(sys.argv[1:]))
