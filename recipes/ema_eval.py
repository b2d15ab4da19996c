"""Evaluate adapters of one base: likelihood probes, sampled answers, a benign task, judges.

tune run recipes/ema_eval.py --config configs/smollm2_135m_eval.yaml [key=value]
"""

import sys

from emarecipes.evaluation.run import run_eval

if __name__ == "__main__":
    sys.exit(run_eval(sys.argv[1:]))
