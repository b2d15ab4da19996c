"""Intervals and tests over training seeds and questions.

Shapes: R resamples, S seeds, Q questions of one probe, C clusters of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from emarecipes.errors import UserError
from emarecipes.evaluation.statistics import wilson

Floats = NDArray[np.float64]
# From the share that each question has in a mean, (R, Q) a probe, to a value a seed, (R, S).
BySeed = Callable[[Mapping[str, Floats]], Floats]

RESAMPLES = 10_000
_Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its uncertainty.

    Attributes:
        value: The estimate.
        error: Its standard error over seeds and questions; with one seed over questions alone. NaN
            where it is not known: of one question, or of one seed of a figure known only as a
            whole.
        freedom: Degrees of freedom of the error.
        seeds: How many there are. One is not enough for any test: every p is 1.
        least, most: What the truth cannot be below and above; an interval ends there.
        monte_carlo: Standard error of `error` itself, since resamples are finite in number.
        ends: The interval, where `error` does not give it: see `share_estimate`.
        of_seeds: V_s, the part of `error`'s square that seeds make.
        clusters: C, of the probe with the fewest.
    """

    value: float
    error: float
    freedom: float
    seeds: int = 2
    least: float = -np.inf
    most: float = np.inf
    monte_carlo: float = 0.0
    ends: tuple[float, float] | None = None
    of_seeds: float = 0.0
    clusters: int = 0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """value -+ t * error, or `ends`; NaN for both ends without an error."""
        if self.ends is not None:
            return self.ends
        half = student_t.ppf((1 + level) / 2, self.freedom) * self.error
        low, high = np.clip([self.value - half, self.value + half], self.least, self.most)
        return float(low), float(high)

    def p_below(self, bound: float) -> float:
        """One-sided p of "the truth is below the bound", against "it is not"."""
        return self._tail(bound - self.value)

    def p_above(self, bound: float) -> float:
        """One-sided p of "the truth is above the bound", against "it is not"."""
        return self._tail(self.value - bound)

    def moved(self, monte_carlo_errors: float) -> Estimate:
        """The same with an error that many of its own Monte Carlo errors larger."""
        return replace(self, error=self.error + monte_carlo_errors * self.monte_carlo)

    def _tail(self, distance: float) -> float:
        if self.seeds < 2 or not np.isfinite(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(student_t.sf(distance / self.error, self.freedom))


def crossed_estimate(
    by_seed: BySeed,
    questions: Mapping[str, int | Sequence[Hashable]],
    *,
    is_share: bool = False,
    limit: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean over seeds of a statistic, with an error from seeds and questions at once.

    Seeds and questions are crossed: every seed answers every question. A bootstrap that resamples
    both has, up to the spread that both share, the variance V_s + V_q. V_s = var(seeds' values) / S
    is what drawing seeds gives, without the factor (S - 1)/S by which few resampled seeds vary too
    little. V_q is the variance over resamples that draw questions, apart for each probe and the
    same ones for all arms and seeds. What is peculiar to a seed and question is in both, so that
    the error is rather too large. The interval is Student's, with Satterthwaite's degrees of
    freedom from S - 1 and the smallest Q - 1, since a percentile interval of few seeds is too
    narrow. `benchmarks/interval_coverage.py` measures the coverage of both; docs/compare.md has it.

    Questions that belong together are drawn together: C clusters with all their questions, and
    C - 1 stands for Q - 1. V_q comes from R draws, so that its own standard error is
    sqrt((m_4 - V_q^2) / R), m_4 the draws' fourth central moment; `Estimate.monte_carlo` has it.

    A share that is 0 or 1 at every question is so in every resample, and V_q would be 0. So V_q of
    shares is at least (z / (C + z^2))^2, z = 1.96: z times its root is then as far as Wilson's
    interval of 0 of C reaches.

    Args:
        by_seed: The statistic of each seed, for any shares of questions. It need not be linear.
        questions: Of each probe that it reads the number of questions, or each one's cluster.
        is_share: Whether it is a difference of shares of answers.
        limit: What such a one is within, -+: 1, more if it is a difference of differences.
        resamples: R, at least `RESAMPLES`.
        seed: Of the resampling.

    Returns:
        The estimate. With one seed its error is V_q's alone, so the interval is that of this seed.
        Of one question, or one cluster, it has no error: drawn again and again it says nothing
        about others.

    Raises:
        UserError: A probe without questions, values that are not finite, no seed, or too few
            resamples.
    """
    if resamples < RESAMPLES:
        raise UserError(f"resamples must be at least {RESAMPLES}, not {resamples}")
    clusters = {
        name: tuple(range(of)) if isinstance(of, int) else _numbered(of)
        for name, of in questions.items()
    }
    for name, numbers in clusters.items():
        if not numbers:
            raise UserError(f"{name}: no question has a score under all arms and seeds")
    even = {name: np.full((1, len(of)), 1 / len(of)) for name, of in clusters.items()}
    values_S = by_seed(even)[0]
    seeds = len(values_S)
    if seeds == 0:
        raise UserError(f"{', '.join(questions)}: no seed in common")
    if not np.isfinite(values_S).all():
        raise UserError(f"{', '.join(questions)}: a score is not finite")
    value, fewest = float(values_S.mean()), min(len(set(of)) for of in clusters.values())
    if fewest < 2:
        return Estimate(value, float("nan"), float("nan"), seeds)
    drawn = {
        name: _shares(of, resamples, seed, place)
        for place, (name, of) in enumerate(clusters.items())
    }
    means_R = by_seed(drawn).mean(axis=1)
    of_questions = float(means_R.var(ddof=1))
    fourth = float(((means_R - means_R.mean()) ** 4).mean())
    uncertain = float(np.sqrt(max(fourth - of_questions**2, 0.0) / resamples))
    if is_share:
        of_questions = max(of_questions, (_Z / (fewest + _Z**2)) ** 2)
    of_seeds = float(values_S.var(ddof=1)) / seeds if seeds > 1 else 0.0
    error = float(np.sqrt(of_seeds + of_questions))
    parts = of_questions**2 / (fewest - 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    freedom = (of_seeds + of_questions) ** 2 / parts if parts > 0 else float(max(seeds - 1, 1))
    monte_carlo = uncertain / (2 * error) if error > 0 else 0.0
    found = Estimate(
        value,
        error,
        float(freedom),
        seeds,
        monte_carlo=monte_carlo,
        of_seeds=of_seeds,
        clusters=fewest,
    )
    return replace(found, least=-limit, most=limit) if is_share else found


def pooled(estimates: Sequence[Estimate]) -> list[Estimate]:
    """The same with the seeds' spread of all of them, where that is more than their own.

    The spread of two or three seeds is hardly known: one in ten that is small by chance makes a
    verdict out of nothing, and of several arms one is soon such. So V_s is at least the mean
    var(seeds' values) of all arms over S, weighted by S - 1; where it is that mean, it has the sum
    of their S - 1 as its degrees of freedom. An arm that spreads more keeps its own of both, since
    others' seeds say nothing of that. Of one estimate nothing changes. `benchmarks/pair_power.py`
    has the family-wise error with it.
    """
    several = [e for e in estimates if e.seeds > 1 and np.isfinite(e.error)]
    freedom = sum(e.seeds - 1 for e in several)
    if len(several) < 2:
        return list(estimates)
    spread = sum(e.of_seeds * e.seeds * (e.seeds - 1) for e in several) / freedom
    return [_with_spread(e, spread, freedom) if e in several else e for e in estimates]


def _with_spread(estimate: Estimate, spread: float, freedom: int) -> Estimate:
    of_questions = max(estimate.error**2 - estimate.of_seeds, 0.0)
    of_seeds = spread / estimate.seeds
    error = float(np.sqrt(of_seeds + of_questions))
    if of_seeds <= estimate.of_seeds or error == 0 or estimate.clusters < 2:
        return estimate
    parts = of_questions**2 / (estimate.clusters - 1) + of_seeds**2 / freedom
    return replace(
        estimate,
        error=error,
        freedom=float((of_seeds + of_questions) ** 2 / parts),
        monte_carlo=estimate.monte_carlo * estimate.error / error,
        of_seeds=of_seeds,
    )


def crossed_mean(
    values_SQ: Floats, clusters: Sequence[Hashable] | None = None, *, is_share: bool = False
) -> Estimate:
    """`crossed_estimate` of the mean over seeds and questions of values (S, Q)."""
    return crossed_estimate(
        lambda shares: shares["questions"] @ values_SQ.T,
        {"questions": values_SQ.shape[1] if clusters is None else clusters},
        is_share=is_share,
    )


def share_estimate(hits_SQ: Floats, clusters: Sequence[Hashable]) -> Estimate:
    """`crossed_mean` of values that are 0 or 1, with Wilson's interval where all are the same.

    There a resample can only repeat them. The interval's n is the number of clusters, whatever the
    number of seeds: what all questions of a cluster and all seeds say alike is said once.
    """
    found = replace(crossed_mean(hits_SQ, clusters), least=0.0, most=1.0)
    if found.value not in (0.0, 1.0):
        return found
    return replace(found, ends=wilson(found.value, len(set(clusters))))


def _numbered(clusters: Sequence[Hashable]) -> tuple[int, ...]:
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return tuple(numbers[cluster] for cluster in clusters)


@lru_cache(maxsize=8)  # The same draws for every arm.
def _shares(clusters: tuple[int, ...], resamples: int, seed: int, place: int) -> Floats:
    """The share of each question in the mean, (R, Q), when clusters are drawn."""
    count = max(clusters) + 1
    rng = np.random.default_rng([seed, place])
    drawn_RC = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    drawn_RQ = drawn_RC[:, list(clusters)].astype(np.float64)
    share_RQ: Floats = drawn_RQ / drawn_RQ.sum(axis=1, keepdims=True)
    return share_RQ
