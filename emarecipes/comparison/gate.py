"""Is there anything to defend against? What undefended training does, beyond a change of style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emarecipes.comparison.criterion import ProbeNames
from emarecipes.comparison.frontier import (
    CONTROLS,
    GENERAL,
    Bound,
    controls_of,
    effect_by_seed,
)
from emarecipes.comparison.results import Scores
from emarecipes.comparison.statistics import Estimate, crossed_estimate
from emarecipes.errors import UserError


@dataclass(frozen=True)
class Effect:
    """The undefended arm's effect, by which every defense is measured.

    Attributes:
        by_probe: Its shift minus that of the controls, on the general probe and on each of its
            conditional forms.
        general: The general probe's name.
        bound: What counts as no difference: a share of the general probe's effect, in its unit.
        controls: Whether there were controls to take off.
    """

    by_probe: dict[str, Estimate]
    general: str
    bound: float
    controls: bool

    @property
    def moved(self) -> frozenset[str]:
        """Probes that undefended training moves: the interval's lower end is above the bound."""
        return frozenset(
            name
            for name, estimate in self.by_probe.items()
            if estimate.seeds > 1 and self.bound > 0 and estimate.interval()[0] > self.bound
        )

    @property
    def is_there(self) -> bool:
        """Whether it moves the general probe. If not, no defense can be called anything."""
        return self.general in self.moved


def general_probes(scores: Scores, probes: ProbeNames) -> list[str]:
    """The general suite and its conditional forms: general questions under another condition.

    Raises:
        UserError: The evaluation has no suite of the general or in-domain probe's name, or controls
            in another unit.
    """
    for role in ("general", "in_domain"):
        name = getattr(probes, role)
        if name not in scores.probes:
            raise UserError(
                f"criteria.{role}: the evaluation has no figure {name}; it has "
                f"{', '.join(scores.probes) or 'none'}"
            )
    if probes.controls in scores.probes:
        units = [scores.probes[name].unit for name in (probes.controls, probes.general)]
        if units[0] != units[1]:
            raise UserError(
                f"criteria.controls: {probes.controls} is in {units[0]}, and general's figure in "
                f"{units[1]}; name another, or null"
            )
    asked = _questions_of(scores.suites[probes.general])
    conditional = [
        name
        for name in scores.probes
        if name not in (probes.general, probes.in_domain, probes.controls)
        and scores.suites[name].get("condition", "none") != "none"
        and _questions_of(scores.suites[name]) == asked
    ]
    return [probes.general, *conditional]


def _questions_of(suite: Mapping[str, Any]) -> Any:
    """What tells whether two suites are of the same questions, by their entries in the summary."""
    return suite.get("asked") or [suite.get("files"), suite.get("trait")]


def measure_effect(
    undefended: Scores, general: Sequence[str], probes: ProbeNames, share: float
) -> Effect:
    """The effect of an undefended arm.

    Args:
        undefended: Its scores.
        general: The general probe and its conditional forms.
        probes: Roles of the suites.
        share: See `BoundSettings.effect_share`.
    """
    found = {}
    for name in general:
        bound = bound_of(undefended, name, probes, range(len(undefended.seeds)), share)
        questions = {GENERAL: bound.general_SQ.shape[1]} | controls_of(bound)
        found[name] = crossed_estimate(
            lambda shares, bound=bound: effect_by_seed(shares, bound),  # type: ignore[misc]
            questions,
            is_share=undefended.probes[name].is_share,
            limit=2.0 if CONTROLS in questions else 1.0,
        )
    return Effect(found, probes.general, share * found[probes.general].value, CONTROLS in questions)


def bound_of(
    undefended: Scores, probe: str, probes: ProbeNames, rows: Sequence[int], share: float
) -> Bound:
    """The bound from some of an undefended arm's seeds, by row."""
    controls = undefended.probes.get(probes.controls)
    return Bound(
        share,
        undefended.probes[probe].of_seeds(rows).values_SQ,
        None if controls is None else controls.of_seeds(rows).values_SQ,
    )
