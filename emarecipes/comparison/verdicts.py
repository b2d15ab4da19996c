"""What can be said of each defense at the level of the whole family of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from statsmodels.stats.multitest import multipletests

from emarecipes.comparison.frontier import Excess

Decision = Literal["better", "worse", "equivalent", "undecided"]
DECIDED = ("better", "worse", "equivalent")


@dataclass(frozen=True)
class Contrast:
    """One defense's predeclared contrast: its excess over the frontier, on each probe.

    The worst probe counts. So "better" and "equivalent" must hold on every probe (the largest p of
    all, an intersection-union test), while "worse" on one is enough (the smallest, times their
    number). On a probe that undefended training does not move there is nothing to be better at:
    there "better" asks that the excess is surely below the bound.

    Attributes:
        excesses: By probe; negative is better.
        moved: The probes that undefended training moves.
    """

    excesses: Mapping[str, Excess]
    moved: frozenset[str]

    @property
    def worst(self) -> str:
        """The probe with the largest excess."""
        return max(self.excesses, key=lambda name: self.excesses[name].estimate.value)

    def p_difference(self, monte_carlo_errors: float = 0.0) -> tuple[float, Decision]:
        """Two-sided p of a difference from the frontier, and its direction.

        Args:
            monte_carlo_errors: So many of them are added to every standard error.
        """
        parts = {name: e.moved(monte_carlo_errors) for name, e in self.excesses.items()}
        better = max(
            (e.estimate if name in self.moved else e.over).p_below(0.0) for name, e in parts.items()
        )
        worse = min(1.0, len(parts) * min(e.estimate.p_above(0.0) for e in parts.values()))
        return min(1.0, 2 * min(better, worse)), "better" if better < worse else "worse"

    def p_equivalent(self, monte_carlo_errors: float = 0.0) -> float:
        """p of "within -+ bound of the frontier": the larger of two one-sided tests (TOST)."""
        parts = [e.moved(monte_carlo_errors) for e in self.excesses.values()]
        return max(max(e.over.p_below(0.0), e.under.p_above(0.0)) for e in parts)


@dataclass(frozen=True)
class Verdict:
    """What can be said of a defense at the family's level.

    Attributes:
        decision: "better" and "worse" go before "equivalent": a small difference is one.
        p_difference: Holm-corrected over all defenses.
        p_equivalent: The same.
        error_difference: Monte Carlo error of `p_difference`: what another seed of the resampling
            would change it by, as a standard deviation.
        error_equivalent: Of `p_equivalent`.
        look: That decided it, of two, see `looks`; 0: there is one.
    """

    decision: Decision
    p_difference: float
    p_equivalent: float
    error_difference: float = 0.0
    error_equivalent: float = 0.0
    look: int = 0


def verdicts(contrasts: Sequence[Contrast], alpha: float = 0.05) -> list[Verdict]:
    """The verdict on each defense, Holm-corrected over the family of all of them.

    A p counts as below alpha if it still is with two of its Monte Carlo errors more: else another
    seed of the resampling would decide.

    Args:
        contrasts: One a defense.
        alpha: Family-wise error rate, of differences and of equivalences each.
    """
    if not contrasts:
        return []
    different = _corrected(contrasts, lambda c, errors: c.p_difference(errors)[0])
    equal = _corrected(contrasts, Contrast.p_equivalent)
    found = []
    for contrast, (p, error), (p_equal, error_equal) in zip(
        contrasts, different, equal, strict=True
    ):
        decision: Decision = "undecided"
        if p + 2 * error < alpha:
            decision = contrast.p_difference()[1]
        elif p_equal + 2 * error_equal < alpha:
            decision = "equivalent"
        found.append(Verdict(decision, p, p_equal, error, error_equal))
    return found


def _corrected(
    contrasts: Sequence[Contrast], p_of: Callable[[Contrast, float], float]
) -> list[tuple[float, float]]:
    """Each one's corrected p, and half its difference between standard errors 1 up and 1 down."""
    plain, up, down = (holm([p_of(c, errors) for c in contrasts]) for errors in (0.0, 1.0, -1.0))
    return [(p, abs(u - d) / 2) for p, u, d in zip(plain, up, down, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]]
