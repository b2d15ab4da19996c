"""Coverage of nominal 95 % intervals of the comparison, on synthetic data with known truth.

    python benchmarks/interval_coverage.py

Two statistics: a mean over seeds and questions, by the percentile bootstrap of
`evaluation.statistics` and by the t interval of `comparison.statistics`; and the excess of a
defense over a curved frontier, whose truth is 0 or -0.1. `seed sd` is the standard deviation of a
seed's own effect, where the questions alone give a standard error of 0.1.
"""

from __future__ import annotations

import argparse

import numpy as np
from crossed_bootstrap import crossed_bootstrap

from emarecipes.comparison.frontier import Bound, Shifts, excess
from emarecipes.comparison.statistics import Floats, crossed_mean

QUESTIONS, IN_DOMAIN_QUESTIONS = 88, 60


def mean_coverage(seeds: int, seed_sd: float, trials: int) -> tuple[float, float, float]:
    """Share of intervals with the truth, percentile and t, and the t interval's mean width."""
    rng = np.random.default_rng(0)
    hits, width = np.zeros(2), 0.0
    for trial in range(trials):
        values = 0.3 + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 1, QUESTIONS) * 0.9
        values = values + rng.normal(0, 0.5, (seeds, QUESTIONS))
        percentile = crossed_bootstrap([(1.0, values)], resamples=10_000, seed=trial)
        low, high = crossed_mean(values).interval()
        hits += [percentile.low <= 0.3 <= percentile.high, low <= 0.3 <= high]
        width += (high - low) / trials
    return hits[0] / trials, hits[1] / trials, width


def curve(x: float) -> float:
    """The true frontier: bent, as training first moves what is easy."""
    return 0.6 * x + 0.2 * x**2


def runs(rng: np.random.Generator, x_S: Floats, y_S: Floats, easy: list[Floats]) -> Shifts:
    """Shifts around each seed's truth; some questions move more than others in every run."""
    general, in_domain = easy
    noise = [rng.normal(0, 0.3, (len(x_S), len(q))) for q in easy]
    return Shifts(
        y_S[:, None] * (1 + general) + noise[0], x_S[:, None] * (1 + in_domain) + noise[1]
    )


def excess_coverage(seeds: int, seed_sd: float, truth: float, trials: int) -> tuple[float, float]:
    """Share of t intervals with the true excess, and their mean width."""
    rng = np.random.default_rng(1)
    hits, width = 0, 0.0
    fractions = (0.1, 0.25, 0.5, 0.75, 1.0)
    for _ in range(trials):
        easy = [rng.normal(0, 0.7, q) for q in (QUESTIONS, IN_DOMAIN_QUESTIONS)]
        easy = [values - values.mean() for values in easy]
        own_S = rng.normal(0, seed_sd, seeds)
        undefended = {}
        for fraction in fractions:
            x_S = np.full(seeds, fraction) * (1 + 0.3 * own_S)
            y_S = np.array([curve(x) for x in x_S])
            undefended[str(fraction)] = runs(rng, x_S, y_S, easy)
        x_S = np.full(seeds, 0.6) + 0.2 * own_S
        y_S = np.array([curve(x) for x in x_S]) + truth + 0.2 * rng.normal(0, seed_sd, seeds)
        bound = Bound(0.25, undefended["1.0"].general_SQ)
        found = excess(runs(rng, x_S, y_S, easy), undefended, bound)
        low, high = found.estimate.interval()
        hits += low <= truth <= high
        width += (high - low) / trials
    return hits / trials, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=400, help="synthetic data sets a line")
    parser.add_argument("--quick", action="store_true", help="20 data sets a line")
    options = parser.parse_args()
    trials = 20 if options.quick else options.trials
    print("| seeds | seed sd | mean, percentile | mean, t (width) | excess, t (width) | shifted |")
    print("| --- | --- | --- | --- | --- | --- |")
    for seeds in (2, 3, 5, 8):
        for seed_sd in (0.0, 0.1, 0.5):
            percentile, student, width = mean_coverage(seeds, seed_sd, trials)
            none, none_width = excess_coverage(seeds, seed_sd, 0.0, trials)
            some, _ = excess_coverage(seeds, seed_sd, -0.1, trials)
            print(
                f"| {seeds} | {seed_sd} | {percentile:.0%} | {student:.0%} ({width:.2f}) "
                f"| {none:.0%} ({none_width:.2f}) | {some:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
