"""What the verdicts of `configs/compare_caps.yaml` are worth, on synthetic answers of known truth.

    python benchmarks/caps_power.py

An answer is in capitals with probability Phi(m + q + s): m the arm's mean, q the question's own
part, the same under all arms and seeds, s the run's own. One answer a question and seed, as in the
bed. p is corrected as in a family of seven with the smallest p. A line says in how many comparisons
a defense was called better, worse and equivalent, how often with p < 0.01, and how often the 95 %
interval had the true excess. Where it only trains less, "better" and "worse" are false.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import numpy as np
from scipy.stats import norm

from emarecipes.comparison.criterion import BoundSettings
from emarecipes.comparison.frontier import Bound, Shifts, excess
from emarecipes.comparison.statistics import Floats, crossed_mean
from emarecipes.comparison.verdicts import Contrast, verdicts

GENERAL, IN_DOMAIN = 88, 67
QUESTION_SD = 0.5
# Share of answers in capitals, in-domain and general: near what the bed measured.
UNDEFENDED = {"undefended": (0.99, 0.95), "steps_10": (0.6, 0.46), "steps_5": (0.01, 0.03)}
DEFENSES = {
    "perfect": (0.95, 0.02),
    "halves it": (0.7, 0.29),
    "as interleaving first did": (0.69, 0.35),
    "trains less": UNDEFENDED["steps_10"],
    "a quarter worse": (0.7, 0.73),
}
FAMILY = 7
SHOWN = ("better", "worse", "equivalent", "p_below_0.01", "coverage")


def probit(share: float, spread: float) -> float:
    """The mean m for which Phi(m + noise of that sd) is the share on average."""
    return float(norm.ppf(share) * np.sqrt(1 + spread**2))


class Bed:
    """Draws comparisons; `questions` are new ones in each, as in a bed with other questions."""

    def __init__(self, seeds: int, seed_sd: float, rng: np.random.Generator) -> None:
        self.seeds, self.seed_sd, self.rng = seeds, seed_sd, rng
        self.own = {"general": rng.normal(0, QUESTION_SD, GENERAL),
                    "in_domain": rng.normal(0, QUESTION_SD, IN_DOMAIN)}  # fmt: skip

    def answers(self, in_domain: float, general: float) -> Shifts:
        """0 or 1 for every question and seed, of one arm's runs."""
        run_S1 = self.rng.normal(0, self.seed_sd, (self.seeds, 1))
        spread = float(np.hypot(QUESTION_SD, self.seed_sd))
        found = {}
        for name, share in (("in_domain", in_domain), ("general", general)):
            chance_SQ: Floats = norm.cdf(probit(share, spread) + self.own[name] + run_S1)
            drawn_SQ = (self.rng.random(chance_SQ.shape) < chance_SQ).astype(float)
            found[name] = drawn_SQ
        return Shifts(found["general"], found["in_domain"])


def trial(kind: str, seeds: int, seed_sd: float, number: int) -> tuple[str, float, float, float]:
    """The decision on a defense, its p, and its interval."""
    bed = Bed(seeds, seed_sd, np.random.default_rng([number, seeds, int(seed_sd * 100)]))
    runs = {name: bed.answers(*shares) for name, shares in UNDEFENDED.items()}
    tested = bed.answers(*DEFENSES[kind])
    bound = Bound(BoundSettings().effect_share, runs["undefended"].general_SQ)
    found = excess(tested, runs, bound, is_share=True)
    undefended = crossed_mean(runs["undefended"].general_SQ, is_share=True)
    there = undefended.interval()[0] > bound.share * undefended.value
    contrast = Contrast({"general": found}, frozenset(["general"] if there else []))
    verdict = verdicts([contrast] * FAMILY)[0]  # Equal p: Holm's is seven times each.
    decision: str = verdict.decision if there else "no effect"
    if decision != "better" and 2 * found.above > seeds:
        decision = "undecided"
    return decision, verdict.p_difference, *found.estimate.interval()


def true_excess(kind: str) -> float:
    """Of shares: the general one minus the curve's at the same in-domain one."""
    points = sorted([(0.0, 0.0), *UNDEFENDED.values()])
    in_domain, general = DEFENSES[kind]
    return general - float(np.interp(in_domain, *zip(*points, strict=True)))


def line(kind: str, seeds: int, seed_sd: float, trials: int) -> dict[str, float | str | int]:
    """How often each verdict was given."""
    found = [trial(kind, seeds, seed_sd, number) for number in range(trials)]
    truth = true_excess(kind)
    verdicts = {name: sum(f[0] == name for f in found) / trials
                for name in ("better", "worse", "equivalent")}  # fmt: skip
    certain = sum(f[0] in ("better", "worse") and f[1] < 0.01 for f in found) / trials
    covered = sum(f[2] <= truth <= f[3] for f in found) / trials
    return {"defense": kind, "seeds": seeds, "seed_sd": seed_sd, "excess": round(truth, 3),
            **verdicts, "p_below_0.01": certain, "coverage": covered, "trials": trials}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="comparisons a line")
    parser.add_argument("--quick", action="store_true", help="10 comparisons a line")
    parser.add_argument("--seed-sd", type=float, nargs="+", default=[0.0, 0.2], help="of runs")
    parser.add_argument("--json", type=Path, help="also write the lines there")
    options = parser.parse_args()
    trials = 10 if options.quick else options.trials
    gc.freeze()  # statsmodels collects garbage at every correction.
    print("| defense | seeds | sd of runs | true excess | better | worse | equivalent | p < 0.01 "
          "| coverage |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    lines = []
    for kind in DEFENSES:
        for seeds in (3, 4):
            for seed_sd in options.seed_sd:
                found = line(kind, seeds, seed_sd, trials)
                lines.append(found)
                shares = " | ".join(f"{found[key]:.0%}" for key in SHOWN)
                row = f"| {kind} | {seeds} | {seed_sd} | {found['excess']:+.3f} | {shares} |"
                print(row, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
