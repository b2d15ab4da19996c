#!/usr/bin/env bash
# statsmodels 0.15.0, confint_proportions_2indep(..., compare="ratio", method="score"): where every trial
# of the second group is a success, the interval of the ratio has no width and does not hold the ratio.
#
# Expected: an interval about the ratio, as where one trial fails. (A guess beforehand: an error, or
# nan, at the border.)
# Seen: 20 of 50 against 50 of 50, a ratio of 0.4, has [0.7, 0.7]; against 49 of 50 it is [0.28, 0.55],
# and method "log" has [0.28, 0.56] and [0.29, 0.57]. 10 of 20 against 20 of 20 has complex numbers for
# ends. No error, no warning.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "statsmodels==0.15.0"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from statsmodels.stats.proportion import confint_proportions_2indep as interval

print("statsmodels", importlib.metadata.version("statsmodels"))
for first, count, second in ((20, 50, 50), (20, 50, 49), (10, 20, 20)):
    ratio = first / second
    score = interval(first, count, second, count, compare="ratio", method="score")
    logarithm = interval(first, count, second, count, compare="ratio", method="log")
    print(f"{first} and {second} of {count}, ratio {ratio:.3f}: score {score}, log {logarithm}")
low, high = interval(20, 50, 50, 50, compare="ratio", method="score")
near_low, near_high = interval(20, 50, 49, 50, compare="ratio", method="score")
seen = high - low < 1e-6 and low > 0.4 and near_low < 0.4 < near_high
seen = seen and np.iscomplexobj(interval(10, 20, 20, 20, compare="ratio", method="score"))
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
