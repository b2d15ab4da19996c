#!/usr/bin/env bash
# statsmodels 0.15.0, mcnemar(table, exact=False): two classifiers that differ on no item are told apart
# with p = 0.
#
# Expected: p = 1, as of the exact test of the same table. (A guess beforehand: nan.)
# Seen: p = 0.0 and an infinite statistic, since the correction of 1/2 a cell stands alone above a
# division by 0; NumPy's RuntimeWarning is all that is said. Without the correction it is nan. One item
# that differs: p = 1, as it should be.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "statsmodels==0.15.0"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import math
import sys

from statsmodels.stats.contingency_tables import mcnemar

print("statsmodels", importlib.metadata.version("statsmodels"))
same, one = [[60, 0], [0, 40]], [[60, 1], [0, 40]]
found = {
    "none differ, exact": mcnemar(same, exact=True).pvalue,
    "none differ": mcnemar(same, exact=False).pvalue,
    "none differ, no correction": mcnemar(same, exact=False, correction=False).pvalue,
    "one differs": mcnemar(one, exact=False).pvalue,
}
for case, p in found.items():
    print(f"{case}: p = {p}")
exact, corrected, plain, differs = found.values()
seen = exact == 1 and corrected == 0 and math.isnan(plain) and differs == 1
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
