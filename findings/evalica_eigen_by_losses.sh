#!/usr/bin/env bash
# evalica 0.4.2 (PyPI), eigen(...), its ranking of models from pairwise comparisons by the leading eigenvector: the
# models stand in the order of how much they lose. The best one is last, and one that never lost has a score of 0.
#
# Expected: as of the package's other methods, which share its arguments and its result ("The element scores", sorted
# with the highest first; the command line calls the place `rank`): whoever wins more, and against better ones, is
# higher. (A guess beforehand, after a first look at a model that won everything: the order is that of the losses.)
# Seen: as guessed, by both solvers. Of three models of which a wins 17 of 20, b 9 of 20 and c 4 of 20, counting,
# average_win_rate, bradley_terry, newman, elo and pagerank say a, b, c; eigen says c, b, a. No error, no warning. With
# every winner swapped it gives the right order, and that is the leading eigenvector of the matrix of wins, computed by
# numpy here. (The matrix has a row's wins over a column and is multiplied from its other side; pagerank, which goes
# through the same function, transposes it once before.) A judge's pairwise preferences over fine-tuned models give a
# leaderboard that is upside down.
# Looked for in a stored copy of the project's issues: not found.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "evalica==0.4.2" "numpy==2.3.5" "pandas==2.3.3" "scipy==1.17.1"
cat >"$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import evalica
import numpy as np
from evalica import Winner

warnings.simplefilter("error")
WINS = {("a", "b"): (8, 2), ("a", "c"): (9, 1), ("b", "c"): (7, 3)}  # of the first, of the second

left, right, winners = [], [], []
for (x, y), (of_x, of_y) in WINS.items():
    left += [x] * (of_x + of_y)
    right += [y] * (of_x + of_y)
    winners += [Winner.X] * of_x + [Winner.Y] * of_y
swapped = [Winner.Y if w == Winner.X else Winner.X for w in winners]

print("evalica", version("evalica"), "numpy", np.__version__)
places = {}
for name in ("counting", "average_win_rate", "bradley_terry", "newman", "elo", "pagerank", "eigen"):
    for solver in ("pyo3", "naive"):
        scores = getattr(evalica, name)(left, right, winners, solver=solver).scores
        places[name, solver] = "".join(scores.index)
        print(f"{name:16} {solver:5} {places[name, solver]}", {m: round(float(s), 3) for m, s in scores.items()})

matrix = np.array([[0, 8, 9], [2, 0, 7], [1, 3, 0]], dtype=float)  # a row's wins over a column
values, vectors = np.linalg.eig(matrix)
leading = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
print("leading eigenvector of the wins:", dict(zip("abc", leading.round(3).tolist())))
turned = evalica.eigen(left, right, swapped).scores
print("eigen, every winner swapped:", {m: round(float(s), 3) for m, s in turned.items()})

never = [Winner.X if "a" in (x, y) else w for x, y, w in zip(left, right, winners)]  # a wins all of its 20
unbeaten = evalica.eigen(left, right, never).scores
print("eigen, a wins everything:", {m: round(float(s), 3) for m, s in unbeaten.items()})

others = {place for (name, _), place in places.items() if name != "eigen"}
ok = others == {"abc"} and places["eigen", "pyo3"] == places["eigen", "naive"] == "cba"
ok = ok and np.allclose(turned[list("abc")].to_numpy(), leading, atol=1e-3)
ok = ok and unbeaten.index[-1] == "a" and unbeaten["a"] < 1e-3
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
