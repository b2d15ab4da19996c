"""Intervals, tests and verdicts over training seeds and questions.

Shapes: R resamples, S seeds, Q questions of one probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests

from emarecipes.errors import UserError

Floats = NDArray[np.float64]
# From the share that each question has in a mean, (R, Q) a probe, to a value a seed, (R, S).
BySeed = Callable[[Mapping[str, Floats]], Floats]
Decision = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its uncertainty.

    Attributes:
        value: The estimate.
        error: Its standard error over seeds and questions; with one seed over questions alone, NaN
            if the figure is known only as a whole.
        freedom: Degrees of freedom of the error.
        seeds: How many there are. One is not enough for any test: every p is 1.
        least, most: What the truth cannot be below and above; an interval ends there.
    """

    value: float
    error: float
    freedom: float
    seeds: int = 2
    least: float = -np.inf
    most: float = np.inf

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """value -+ t * error; NaN for both ends without an error."""
        half = student_t.ppf((1 + level) / 2, self.freedom) * self.error
        low, high = np.clip([self.value - half, self.value + half], self.least, self.most)
        return float(low), float(high)

    def p_below(self, bound: float) -> float:
        """One-sided p of "the truth is below the bound", against "it is not"."""
        return self._tail(bound - self.value)

    def p_above(self, bound: float) -> float:
        """One-sided p of "the truth is above the bound", against "it is not"."""
        return self._tail(self.value - bound)

    def p_within(self, bound: float) -> float:
        """p of "the truth lies within -+ bound": the larger of two one-sided tests (TOST)."""
        return max(self.p_below(bound), self.p_above(-bound))

    def _tail(self, distance: float) -> float:
        if self.seeds < 2 or not np.isfinite(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(student_t.sf(distance / self.error, self.freedom))


def crossed_estimate(
    by_seed: BySeed, questions: Mapping[str, int], *, resamples: int = 2000, seed: int = 0
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

    Args:
        by_seed: The statistic of each seed, for any shares of questions. It need not be linear.
        questions: Number of questions of each probe that it reads.
        resamples: R.
        seed: Of the resampling.

    Returns:
        The estimate; with one seed its error is V_q's alone, so the interval is that of this seed.

    Raises:
        UserError: A probe without questions, or values that are not finite.
    """
    for name, count in questions.items():
        if count == 0:
            raise UserError(f"{name}: no question has a score under all arms and seeds")
    even = {name: np.full((1, count), 1 / count) for name, count in questions.items()}
    values_S = by_seed(even)[0]
    seeds = len(values_S)
    if not np.isfinite(values_S).all():
        raise UserError(f"{', '.join(questions)}: a score is not finite")
    rng = np.random.default_rng(seed)
    drawn = {
        name: rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        for name, count in questions.items()
    }
    of_questions = float(by_seed(drawn).mean(axis=1).var(ddof=1))
    of_question_freedom = max(min(questions.values()) - 1, 1)
    if seeds == 1:
        error = float("nan") if min(questions.values()) < 2 else float(np.sqrt(of_questions))
        return Estimate(float(values_S[0]), error, float(of_question_freedom), seeds)
    of_seeds = float(values_S.var(ddof=1)) / seeds
    variance = of_seeds + of_questions
    parts = of_seeds**2 / (seeds - 1) + of_questions**2 / of_question_freedom
    freedom = variance**2 / parts if parts > 0 else float(seeds - 1)
    return Estimate(float(values_S.mean()), float(np.sqrt(variance)), float(freedom), seeds)


def crossed_mean(values_SQ: Floats) -> Estimate:
    """`crossed_estimate` of the mean over seeds and questions of values (S, Q)."""
    return crossed_estimate(
        lambda shares: shares["questions"] @ values_SQ.T, {"questions": values_SQ.shape[1]}
    )


def mean_over_seeds(values_S: Floats) -> Estimate:
    """Mean over seeds with Student's interval, for a figure that is known only as a whole."""
    seeds = len(values_S)
    if seeds == 1:
        return Estimate(float(values_S[0]), float("nan"), float("nan"), seeds)
    error = float(values_S.std(ddof=1) / np.sqrt(seeds))
    return Estimate(float(values_S.mean()), error, float(seeds - 1), seeds)


@dataclass(frozen=True)
class Contrast:
    """One defense's predeclared contrast: its excess over the frontier, on each probe.

    The worst probe counts. So "better" and "equivalent" must hold on every probe (the largest p of
    all, an intersection-union test), while "worse" on one is enough (the smallest, times their
    number).

    Attributes:
        excesses: By probe; negative is better.
    """

    excesses: Mapping[str, Estimate]

    @property
    def worst(self) -> str:
        """The probe with the largest excess."""
        return max(self.excesses, key=lambda name: self.excesses[name].value)

    def p_difference(self) -> tuple[float, Decision]:
        """Two-sided p of a difference from the frontier, and its direction."""
        better = max(e.p_below(0.0) for e in self.excesses.values())
        worse = min(1.0, len(self.excesses) * min(e.p_above(0.0) for e in self.excesses.values()))
        return min(1.0, 2 * min(better, worse)), "better" if better < worse else "worse"

    def p_equivalent(self, bound: float) -> float:
        """p of "within -+ bound of the frontier"."""
        return max(e.p_within(bound) for e in self.excesses.values())


@dataclass(frozen=True)
class Verdict:
    """What can be said of a defense at the family's level.

    Attributes:
        decision: "equivalent" goes before "better": a difference below the bound does not count.
        p_difference: Holm-corrected over all defenses.
        p_equivalent: The same.
    """

    decision: Decision
    p_difference: float
    p_equivalent: float


def verdicts(contrasts: Sequence[Contrast], bound: float, alpha: float = 0.05) -> list[Verdict]:
    """The verdict on each defense, Holm-corrected over the family of all of them.

    Args:
        contrasts: One a defense.
        bound: Half width of what counts as equivalent, in the unit of the excess.
        alpha: Family-wise error rate, of differences and of equivalences each.
    """
    if not contrasts:
        return []
    differences = [contrast.p_difference() for contrast in contrasts]
    p_difference = holm([p for p, _ in differences])
    p_equivalent = holm([contrast.p_equivalent(bound) for contrast in contrasts])
    found = []
    for (_, direction), different, equal in zip(
        differences, p_difference, p_equivalent, strict=True
    ):
        decision: Decision = direction if different < alpha else "undecided"
        if equal < alpha:
            decision = "equivalent"
        found.append(Verdict(decision, different, equal))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]]
