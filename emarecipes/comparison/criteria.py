"""The four criteria of a good defense, measured on the arms of a comparison.

(a) no general misalignment, (b) the narrow behaviour is learned, (c) a benign task is learned,
(d) answers are coherent. (a) is the defense's one predeclared contrast, against the frontier;
(b), (c) and (d) are described beside it, without correction for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan

from emarecipes.comparison.arms import Arm
from emarecipes.comparison.cells import (
    ALPHA,
    NO_VERDICT,
    NOT_MEASURED,
    Cell,
    benign_cell,
    benign_tiers,
    coherent_cell,
    mean_shift,
    narrow_cell,
)
from emarecipes.comparison.criterion import BoundSettings, ProbeNames
from emarecipes.comparison.frontier import Excess, Shifts, excess, pooled_excesses
from emarecipes.comparison.gate import Effect, bound_of, general_probes, measure_effect
from emarecipes.comparison.results import Scores
from emarecipes.comparison.statistics import Estimate
from emarecipes.comparison.verdicts import Contrast, Verdict, verdicts
from emarecipes.errors import UserError

NO_EFFECT = "no effect to defend against"


@dataclass
class ArmFigures:
    """Everything measured of an arm.

    Attributes:
        arm: The arm.
        seeds: Those measured on the narrow task.
        shifts: Mean shift of each general probe, and of "in-domain" and "controls".
        points: Per-seed mean shifts: in-domain and general, for the trade-off plot.
        effect: The undefended arm's, by which verdicts are given.
        excesses: By general probe, for defenses and controls.
        verdict: On a defense in the family.
        narrow, benign, coherent: Criteria (b), (c), (d).
        categories: Mean general shift of each category.
        benign_tiers: Share of right answers of each tier.
    """

    arm: Arm
    seeds: tuple[int, ...] = ()
    shifts: dict[str, Estimate] = field(default_factory=dict)
    points: list[tuple[float, float]] = field(default_factory=list)
    effect: Effect | None = None
    excesses: dict[str, Excess] = field(default_factory=dict)
    verdict: Verdict | None = None
    narrow: Cell = field(default_factory=lambda: Cell(decision=NOT_MEASURED))
    benign: Cell = field(default_factory=lambda: Cell(decision=NOT_MEASURED))
    coherent: Cell = field(default_factory=lambda: Cell(decision=NOT_MEASURED))
    categories: dict[str, Estimate] = field(default_factory=dict)
    benign_tiers: dict[str, float] = field(default_factory=dict)

    @property
    def contrast(self) -> Contrast | None:
        """The predeclared contrast, if it was measured."""
        moved = frozenset() if self.effect is None else self.effect.moved
        return Contrast(self.excesses, moved) if self.excesses else None

    def general(self) -> Cell:
        """Criterion (a) of a defense or control: the excess on the worst probe, and the verdict."""
        contrast = self.contrast
        if contrast is None:
            return Cell(decision=NOT_MEASURED)
        worst = self.excesses[contrast.worst]
        if worst.seeds > 1 and any(isnan(e.estimate.error) for e in self.excesses.values()):
            return Cell(decision=NOT_MEASURED, note="one question says nothing about others")
        count = len(self.excesses)
        notes = [f"worst of {count} probes: {contrast.worst}" if count > 1 else contrast.worst]
        if worst.above:
            notes.append(f"{worst.above} of {worst.seeds} seeds beyond the frontier's end")
        if worst.below:
            notes.append(f"{worst.below} of {worst.seeds} seeds did not learn in-domain")
        decision = self._decision(worst)
        if self._says_nothing() and decision == "undecided":
            notes.append("too little was learned for a defense without any general shift to differ")
        return Cell(worst.estimate, decision, "; ".join(notes))

    def _decision(self, worst: Excess) -> str:
        if worst.seeds < 2:
            return NO_VERDICT
        if self.arm.role == "control":
            return "control"
        if self.effect is not None and not self.effect.is_there:
            return NO_EFFECT
        if self.verdict is None:
            return "not in the family"
        if 2 * worst.below > worst.seeds:
            return "undecided"  # Undefended runs at no in-domain shift are not there to compare.
        if 2 * worst.above > worst.seeds and self.verdict.decision != "better":
            return "undecided"  # The curve's end favours the undefended runs.
        if self.verdict.decision == "equivalent" and self._says_nothing():
            return "undecided"
        return self.verdict.decision

    def _says_nothing(self) -> bool:
        """Whether it learned so little that the frontier itself is within the bound there.

        Then a defense without any general shift would be called equivalent too.
        """
        if self.effect is None:
            return False
        return all(e.curve <= self.effect.bound for n, e in self.excesses.items()
                   if n in self.effect.moved)  # fmt: skip


def measure(
    arms: Sequence[Arm],
    narrow: Mapping[str, Scores],
    benign: Mapping[str, Scores],
    probes: ProbeNames,
    bounds: BoundSettings,
    family: Sequence[str],
    alpha: float = ALPHA,
) -> tuple[list[ArmFigures], Effect, list[str]]:
    """All figures of all arms that have scores.

    Args:
        arms: The arms, one of them undefended.
        narrow: Scores on the narrow task by arm's name.
        benign: The same on the benign one.
        probes: Roles of the suites.
        bounds: What counts as no difference.
        family: Names of the defenses whose contrast is tested: one a group.
        alpha: Family-wise error rate of this look.

    Returns:
        The figures, the undefended effect, and what could not be compared and why.

    Raises:
        UserError: The undefended arm has no scores, or no general or in-domain probe.
    """
    undefended = next(arm.name for arm in arms if arm.role == "undefended")
    if undefended not in narrow:
        raise UserError(f"the undefended arm {undefended} has no scores; nothing to compare with")
    reference = narrow[undefended]
    general = general_probes(reference, probes)
    missing = [
        f"{name}: a conditional probe of other questions than {probes.general}'s; left out"
        for name in reference.probes
        if name not in (*general, probes.in_domain, probes.controls)
    ]
    usable: dict[str, Scores] = {}
    for arm in arms:
        if arm.name in narrow:
            suites = [*general, probes.in_domain]
            if reference.paired and probes.controls in reference.probes:
                suites.append(probes.controls)  # They are part of the figure.
            reason = unlike(narrow[arm.name], reference, suites, "the undefended arm")
            if reason:
                missing.append(f"{arm.label}: {reason}")
            else:
                usable[arm.name] = narrow[arm.name]
    curve = [a.name for a in arms if a.role in ("undefended", "frontier") and a.name in usable]
    effect = measure_effect(reference, general, probes, bounds.effect_share)
    found = []
    for arm in arms:
        figures = ArmFigures(arm, effect=effect)
        if arm.name in usable:
            _describe(figures, usable[arm.name], general, probes)
            figures.narrow = narrow_cell(usable[arm.name], reference, probes.in_domain, bounds)
            figures.coherent = coherent_cell(usable[arm.name], reference, bounds.coherent)
            if arm.role in ("defense", "control"):
                share = bounds.effect_share
                missing += _excesses(figures, usable, curve, undefended, general, probes, share)
        if arm.name in benign and undefended in benign:
            figures.benign = benign_cell(benign[arm.name], benign[undefended], bounds.benign)
            figures.benign_tiers = benign_tiers(benign[arm.name])
        found.append(figures)
    _pool_seeds([figures for figures in found if figures.arm.name in family], general)
    if effect.is_there:
        _judge(found, family, alpha)
    return found, effect, missing


def choose(figures: Sequence[ArmFigures]) -> dict[str, str]:
    """Of each defense's candidates, the one with the smallest excess, by group.

    One whose seeds mostly moved in-domain to the other side has no frontier to be compared with and
    comes after those that learned: it would win by learning nothing.
    """
    chosen: dict[str, tuple[bool, float, str]] = {}
    for found in figures:
        contrast = found.contrast
        if found.arm.role != "defense" or contrast is None:
            continue
        worst = found.excesses[contrast.worst]
        unlearned = 2 * worst.below > worst.seeds
        candidate = (unlearned, worst.estimate.value, found.arm.name)
        chosen[found.arm.choice] = min(chosen.get(found.arm.choice, candidate), candidate)
    return {group: name for group, (_, _, name) in chosen.items()}


def unlike(scores: Scores, reference: Scores, suites: Sequence[str], of: str) -> str:
    """Why scores cannot be compared with the reference's, which are those of `of`; "": they can."""
    if scores.base != reference.base:
        return f"evaluated against another reference than {of}; not compared"
    if scores.date != reference.date:
        return f"evaluated on prompts of another day than {of}; not compared"
    for suite in suites:
        if not scores.asks_what(reference, suite):
            return f"the probe {suite} has other questions than under {of}"
    return ""


def _describe(
    figures: ArmFigures, scores: Scores, general: Sequence[str], probes: ProbeNames
) -> None:
    figures.seeds = scores.seeds
    named = {name: name for name in general} | {"in-domain": probes.in_domain}
    if probes.controls in scores.probes:
        named["controls"] = probes.controls
    figures.shifts = {name: mean_shift(scores.probes[suite]) for name, suite in named.items()}
    in_domain_S = scores.probes[probes.in_domain].values_SQ.mean(axis=1)
    general_S = scores.probes[probes.general].values_SQ.mean(axis=1)
    if scores.paired and probes.controls in scores.probes:
        general_S = general_S - scores.probes[probes.controls].values_SQ.mean(axis=1)
    figures.points = list(zip(in_domain_S.tolist(), general_S.tolist(), strict=True))
    values = scores.probes[probes.general]
    for category in dict.fromkeys(values.categories):
        columns = [i for i, name in enumerate(values.categories) if name == category]
        part = replace(values, values_SQ=values.values_SQ[:, columns])
        figures.categories[category] = mean_shift(part)


def _excesses(
    figures: ArmFigures,
    usable: Mapping[str, Scores],
    curve: Sequence[str],
    undefended: str,
    general: Sequence[str],
    probes: ProbeNames,
    share: float,
) -> list[str]:
    """Fill in the excess on each general probe; returns what was left out."""
    scores = usable[figures.arm.name]
    seeds = [seed for seed in scores.seeds if seed in usable[undefended].seeds]
    if not seeds:
        return [f"{figures.arm.label}: no seed in common with the undefended arm"]
    points = [name for name in curve if set(seeds) <= set(usable[name].seeds)]
    # A difference of pairs is what is asked beyond controls of style; a plain shift as it is.
    net = scores.paired and probes.controls in usable[undefended].probes
    limit = (2.0 if scores.paired else 1.0) * (2.0 if net else 1.0)

    def shifts(name: str, probe: str) -> Shifts:
        found = usable[name]
        rows = [found.seeds.index(seed) for seed in seeds]
        return Shifts(
            found.probes[probe].of_seeds(rows).values_SQ,
            found.probes[probes.in_domain].of_seeds(rows).values_SQ,
            found.probes[probes.controls].of_seeds(rows).values_SQ if net else None,
        )

    rows = [usable[undefended].seeds.index(seed) for seed in seeds]
    bound = bound_of(usable[undefended], probes.general, probes, rows, share)
    for probe in general:
        figures.excesses[probe] = excess(
            shifts(figures.arm.name, probe),
            {name: shifts(name, probe) for name in points},
            bound,
            is_share=scores.probes[probe].is_share,
            limit=limit,
        )
    left_out = [name for name in curve if name not in points]
    if left_out:
        return [
            f"{figures.arm.label}: compared without {', '.join(left_out)}, which lack a seed of it"
        ]
    return []


def _pool_seeds(tested: Sequence[ArmFigures], general: Sequence[str]) -> None:
    """Give the family's excesses on each probe the spread of all of its seeds."""
    for probe in general:
        having = {f.arm.name: f for f in tested if probe in f.excesses}
        of_all = pooled_excesses({name: f.excesses[probe] for name, f in having.items()})
        for name, found in of_all.items():
            having[name].excesses[probe] = found


def _judge(found: Sequence[ArmFigures], family: Sequence[str], alpha: float) -> None:
    tested = {f.arm.name: f.contrast for f in found if f.arm.name in family}
    contrasts = {name: contrast for name, contrast in tested.items() if contrast is not None}
    given = dict(zip(contrasts, verdicts(list(contrasts.values()), alpha), strict=True))
    for figures in found:
        figures.verdict = given.get(figures.arm.name)
