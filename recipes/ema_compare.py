"""Compare defenses with undefended training that learned as much, and write a report.

tune run recipes/ema_compare.py --config configs/compare_smollm2_135m_quick.yaml [key=value]
"""

import sys

from emarecipes.comparison.run import run_compare

if __name__ == "__main__":
    sys.exit(run_compare(sys.argv[1:]))
