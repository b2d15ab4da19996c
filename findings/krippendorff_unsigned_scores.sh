#!/usr/bin/env bash
# krippendorff 0.9.0 (PyPI), alpha(...) at the levels "interval" (its default) and "ratio": of the same scores, held as
# unsigned integers, it gives another figure.
#
# Expected: the type in which scores from 0 to 100 are held does not matter: 0.98 here, which a sum over all pairs in
# float64 gives too. The computation has a `dtype` of its own, float64 unless told otherwise. (A guess beforehand: the
# differences wrap around, silently.)
# Seen: as guessed. uint8 gives -0.07 (raters who agree are said to disagree systematically), uint16 0.15, and "ratio"
# -5.6 and -5.3 in place of 0.52; int64, float32 and float64 give the right one. No error, no warning. (Values are subtracted in
# their own type, and only the difference is made a float.) The nominal and the ordinal level are right.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "krippendorff==0.9.0" "numpy==2.3.5"
cat >"$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import krippendorff
import numpy as np

warnings.simplefilter("error")
SCORES = [[10, 80, 30, 0, 90, 55], [20, 75, 30, 5, 100, 50]]  # two raters, six answers


def by_pairs(scores):
    """1 - observed over expected disagreement, squared differences, each pair in float64."""
    values = [float(v) for rater in scores for v in rater]
    observed = sum((float(a) - float(b)) ** 2 for a, b in zip(*scores)) / len(scores[0])
    pairs = len(values) * (len(values) - 1)
    return 1 - observed / (sum((a - b) ** 2 for a in values for b in values) / pairs)


print("krippendorff", version("krippendorff"), "numpy", np.__version__)
right = by_pairs(SCORES)
print(f"by pairs: {right:.4f}")
seen = {}
for level in ("nominal", "ordinal", "interval", "ratio"):
    for kind in ("float64", "float32", "int64", "uint8", "uint16"):
        scores = np.array(SCORES, dtype=kind)
        seen[level, kind] = float(krippendorff.alpha(reliability_data=scores, level_of_measurement=level))
    print(level, {kind: round(seen[level, kind], 4) for l, kind in seen if l == level})
signed = ("float64", "float32", "int64")
ok = all(abs(seen["interval", kind] - right) < 1e-6 for kind in signed)
for level in ("nominal", "ordinal"):
    ok = ok and len({round(a, 6) for (l, _), a in seen.items() if l == level}) == 1
ok = ok and seen["interval", "uint8"] < 0 and seen["interval", "uint16"] < 0.3 and seen["ratio", "uint16"] < -1 < 0.5 < seen["ratio", "float64"]
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
