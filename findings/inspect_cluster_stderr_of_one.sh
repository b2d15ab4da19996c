#!/usr/bin/env bash
# inspect_ai 0.3.285, stderr(cluster=...): with all samples in one cluster the standard error is 0.0.
#
# Expected: what a clustered error of one cluster is, not a number (its one sum of residuals is 0 by how the
# mean is made), as of three clusters it is statsmodels' with the correction G / (G - 1); or an error.
# (A guess beforehand: a warning, or the plain error; and no correction for few clusters, which was wrong.)
# Seen: 0.0, without a warning, where the plain error is 0.25: a report then shows a figure as known exactly.
# statsmodels gives no finite number.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "inspect_ai==0.3.285" "statsmodels==0.14.6"
cat >"$folder/try.py" <<'PYTHON'
import sys
import warnings

import inspect_ai
import numpy as np
import statsmodels.api as sm
from inspect_ai.scorer import SampleScore, Score, stderr
from statsmodels.stats.sandwich_covariance import cov_cluster


def error(values, groups, **arguments):
    scores = [
        SampleScore(score=Score(value=float(v)), sample_id=i, sample_metadata={"group": g})
        for i, (v, g) in enumerate(zip(values, groups))
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = float(stderr(**arguments)(scores))
    return found, [str(w.message) for w in told]


one = ([1, 1, 0, 1], ["a"] * 4)
print("inspect_ai", inspect_ai.__version__)
plain, _ = error(*one)
clustered, told = error(*one, cluster="group")
print(f"one cluster of 4: plain {plain:.4f}, clustered {clustered:.4f}, warnings {told}")

values, groups = [1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]
three, _ = error(values, groups, cluster="group")
fit = sm.OLS(np.array(values, float), np.ones(6)).fit()
codes = np.unique(groups, return_inverse=True)[1]
corrected = float(cov_cluster(fit, codes)[0, 0])
print(f"three clusters: its square {three**2:.6f}, statsmodels {corrected:.6f}")
fit = sm.OLS(np.array(one[0], float), np.ones(4)).fit()
try:
    alone = float(cov_cluster(fit, np.zeros(4, dtype=int))[0, 0])
except ZeroDivisionError:
    alone = float("nan")
print(f"one cluster in statsmodels: {alone}")
same = (
    (clustered, plain, told) == (0.0, 0.25, [])
    and abs(three**2 - corrected) < 1e-12
    and not np.isfinite(alone)
)
sys.exit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" || {
  echo "changed: not what is described above"
  exit 1
}
