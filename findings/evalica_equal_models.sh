#!/usr/bin/env bash
# evalica 0.4.2 (PyPI), newman(...) and bradley_terry(...): where their iteration does not settle, all models are said
# to be equal. newman says so of any two models that never drew, 19 to 1 or 1 to 19; both say so of all models
# where one never lost. bootstrap(...) puts an interval without width around that.
#
# Expected, of two models: the ratio of their wins, which is the maximum likelihood of Bradley and Terry's model, with
# newman as with bradley_terry (its paper is about the same estimate, sooner). Of a model that never lost: an
# error, a warning or infinity for that one, and for the others what their own comparisons say (12 to 8: 0.6).
# (Guesses beforehand: in a bootstrap, resamples without a loss give 0 to all; newman of two was met by chance, and the
# guess was that it runs round a cycle of two, of which limit=99 shows the other end.)
# Seen: as guessed, and more. newman of 19 wins to 1 has scores 1.0 and 1.0 at the default limit of 100, 19.0 and 0.053
# at 99; of 12 to 8 it has an interval [1.0, 1.0], standard error 0.0. With a single draw it is right. Of 40
# wins in 40 for a, 12 to 8 between b and c: scores below 0.001 for each, all win probabilities 0.5, a against b
# too, no width. If a lost one of 40, its score is 11.7, but four of ten resamples are such: the percentile interval of
# the best model is [0.0, 13.6]. No error, no warning of evalica's, and bradley_terry reports two iterations. (Its
# score is infinite there, the others become NaN with it in their sums, and NaN is replaced by the tolerance.) A
# fine-tuned model against its base, by a judge's preferences, is such a pair. elo, counting and average_win_rate are
# not concerned.
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
from evalica import Winner


def rows(wins):
    """Of each pair: wins of the first, wins of the second, draws."""
    left, right, winners = [], [], []
    for (x, y), (of_x, of_y, drawn) in wins.items():
        left += [x] * (of_x + of_y + drawn)
        right += [y] * (of_x + of_y + drawn)
        winners += [Winner.X] * of_x + [Winner.Y] * of_y + [Winner.Draw] * drawn
    return left, right, winners


def plain(series):
    return {m: round(float(s), 3) for m, s in sorted(series.items())}


def resampled(method, wins):
    return evalica.bootstrap(method, *rows(wins), n_resamples=500, bootstrap_method="percentile", random_state=0)


NEVER = {("a", "b"): (20, 0, 0), ("a", "c"): (20, 0, 0), ("b", "c"): (12, 8, 0)}
ONCE = {**NEVER, ("a", "b"): (19, 1, 0)}

print("evalica", version("evalica"))
ok = True
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for first, second, drawn in ((19, 1, 0), (1, 19, 0), (12, 8, 0), (19, 1, 1)):
        two = {("new", "base"): (first, second, drawn)}
        seen = {s: evalica.newman(*rows(two), solver=s).scores for s in ("pyo3", "naive")}
        other = evalica.newman(*rows(two), limit=99).scores
        usual = evalica.bradley_terry(*rows(two)).scores
        print(f"{first} to {second}, {drawn} draws: newman {plain(seen['pyo3'])}, limit=99 {plain(other)};", end=" ")
        print("bradley_terry", plain(usual))
        for scores in seen.values():
            told = first / second if drawn else 1
            ok = ok and abs(scores["new"] / scores["base"] / told - 1) < 0.05
        ok = ok and (drawn or abs(usual["new"] / usual["base"] - first / second) < 1e-2)
    spread = resampled(evalica.newman, {("new", "base"): (12, 8, 0)})
    print("12 to 8, newman's bootstrap: from", plain(spread.low), "to", plain(spread.high), end=" ")
    print("error", plain(spread.stderr))
    ok = ok and (spread.high - spread.low).max() < 1e-6 and spread.stderr.max() < 1e-6

    for method in (evalica.bradley_terry, evalica.newman):
        for solver in ("pyo3", "naive"):
            result = method(*rows(NEVER), solver=solver)
            frame = evalica.pairwise_frame(result.scores)
            pairs = {x + y: round(float(frame.loc[x, y]), 3) for x, y in NEVER}
            print(f"a never lost, {method.__name__}, {solver}: {plain(result.scores)},", end=" ")
            print(f"win probabilities {pairs}, {result.iterations} iterations")
            ok = ok and result.scores.abs().max() < 1e-3 and set(pairs.values()) == {0.5}
    for name, wins in (("never lost", NEVER), ("lost once", ONCE)):
        spread = resampled(evalica.bradley_terry, wins)
        nothing = float((spread.distribution.abs().max(axis=1) < 1e-3).mean())
        print(f"a {name}, bootstrap of bradley_terry: {plain(spread.result.scores)} from {plain(spread.low)}", end=" ")
        print(f"to {plain(spread.high)}, error {plain(spread.stderr)}; all are 0 in {nothing:.2f} of the resamples")
        if wins is NEVER:
            ok = ok and nothing == 1 and spread.high.max() < 1e-3 and spread.stderr.max() < 1e-3
        else:
            ok = ok and 0.2 < nothing < 0.6 and spread.low.max() < 1e-3 and spread.result.scores["a"] > 10
ours = [str(w.message) for w in said if "evalica" in w.filename]
print("warnings of evalica's:", len(ours))
sys.exit(0 if ok and not ours else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
