"""Two looks at the report half: at fewer questions first, and at all where that did not decide.

Each look has a part of the family-wise error rate, by O'Brien and Fleming's spending function; the
parts add up to the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.stats import norm

from emarecipes.comparison.arms import Arm, Job
from emarecipes.comparison.collected import adapter_mark
from emarecipes.comparison.criteria import ArmFigures
from emarecipes.comparison.opening import OPENING, Opening, differing
from emarecipes.comparison.settings import GOOD, Plan
from emarecipes.comparison.verdicts import DECIDED, Verdict
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.fingerprint import digest

LOOKS = "looks.json"
COUNT = 2
# Verdicts of two looks stand side by side only by the same of these, see `rules_of`.
SHARED = ("the bounds", "the criteria")

# Fingerprints of runs on the narrow and good tasks, by arm and seed.
Runs = dict[str, dict[str, str]]


def alpha_of(look: int, alpha: float = 0.05) -> float:
    """The error rate that a look of two may spend: a(look / 2) - a((look - 1) / 2).

    a(t) = 4 (1 - Phi(z / sqrt t)), z the 1 - alpha / 4 quantile: Lan and DeMets' two-sided form of
    O'Brien and Fleming (Biometrika 70, 1983), with a(0) = 0 and a(1) = alpha. So 0.0031 and 0.0469
    of 0.05. A look's family is tested at its part as if it were alone. By the union bound the
    family-wise error rate is then at most alpha, however the looks depend on one another and
    whatever their questions; the exact second level (0.0490) would need their correlation, which
    seeds that both looks share make unknown.
    """

    def spent(at: int) -> float:
        if at == 0:
            return 0.0
        return 4 * float(norm.sf(norm.isf(alpha / 4) / (at / COUNT) ** 0.5))

    return spent(look) - spent(look - 1)


@dataclass(frozen=True)
class FirstLook:
    """What the first look found.

    Attributes:
        taken: Time, ISO 8601.
        questions: Of the general probe.
        verdicts: By arm, of those that it decided.
        runs: What it looked at; "" for a run that was lacking. Older files do not say it.
        curve: The arms that the others are compared with.
        rules: See `rules_of`.
        last: When the last look was taken, ISO 8601; "" before.
    """

    taken: str
    questions: int
    verdicts: dict[str, Verdict]
    runs: Runs = field(default_factory=dict)
    curve: list[str] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)
    last: str = ""

    @classmethod
    def read(cls, folder: Path) -> FirstLook | None:
        """None if there was none.

        Raises:
            UserError: Its file is broken.
        """
        path = folder / LOOKS
        if not path.exists():
            return None
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            verdicts = {name: Verdict(**entry) for name, entry in known["verdicts"].items()}
            known |= {"verdicts": verdicts, "questions": int(known["questions"])}
            return cls(**known)
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{path}: broken; it says what the first look found") from None

    @classmethod
    def of(
        cls,
        figures: Sequence[ArmFigures],
        questions: int,
        taken: str,
        runs: Runs,
        rules: dict[str, str],
    ) -> FirstLook:
        """What this look decides, at these runs."""
        seeds = {found.arm.name: found.seeds for found in figures}
        read = {
            name: {seed: mark if int(seed) in seeds[name] else "" for seed, mark in of.items()}
            for name, of in runs.items()
            if name in seeds
        }
        verdicts = {
            found.arm.name: replace(found.verdict, look=1)
            for found in figures
            if found.verdict is not None and found.general().decision in DECIDED
        }
        curve = [f.arm.name for f in figures if f.arm.role in ("undefended", "frontier")]
        return cls(taken, questions, verdicts, read, curve, rules)

    def taken_again(self, again: FirstLook) -> FirstLook:
        """What is on record once this look was taken again: itself, but for runs that it lacked.

        Raises:
            UserError: The record does not say at which runs it looked, and the verdicts differ.
        """
        if not self.runs:
            before, now = ({n: v.decision for n, v in f.verdicts.items()} for f in (self, again))
            if (before, self.questions) != (now, again.questions):
                raise UserError(
                    f"looks.at: the first look, taken on {self.taken}, had other verdicts than "
                    f"those of now ({LOOKS}); it is taken once: go on with 2"
                )
        lost = any(
            mark and not again.runs.get(name, {}).get(seed)
            for name, of in self.runs.items()
            for seed, mark in of.items()
        )
        return self if lost or again.runs == self.runs else replace(again, taken=self.taken)

    def write(self, folder: Path) -> None:
        """As JSON."""
        write_json(folder / LOOKS, asdict(self), indent=1)

    def settle(self, figures: Sequence[ArmFigures]) -> None:
        """Put what it decided in place of the last look's verdicts.

        But a difference that the last look found stands before an equivalence that this one found.
        """
        for found in figures:
            first = self.verdicts.get(found.arm.name)
            if found.verdict is None or first is None:
                continue
            if first.decision == "equivalent" and found.verdict.decision in ("better", "worse"):
                continue
            found.verdict = first

    def changes(self, runs: Runs, rules: Mapping[str, str]) -> list[str]:
        """What a first look would be at now and was not, a few words each."""
        before, after = (
            sorted({int(s) for of in r.values() for s in of}) for r in (self.runs, runs)
        )
        found = [f"{name} (added)" for name in runs if name not in self.runs]
        found += self._changed(runs)
        found += [
            f"{n} (removed)" for n, of in self.runs.items() if n not in runs and any(of.values())
        ]
        if before != after:
            found.append(f"the seeds ({before} then, {after} now)")
        return found + differing(self.rules, rules)

    def unsettled(self, runs: Runs, curve: Sequence[str], rules: Mapping[str, str]) -> list[str]:
        """What is other at the last look, so that the first one's verdicts are not of it."""
        found = self._changed(runs)
        found += [f"{name} (added)" for name in curve if name not in self.curve]
        found += [f"{name} (removed)" for name in self.curve if name not in curve]
        return found + [name for name in differing(self.rules, rules) if name in SHARED]

    def _changed(self, runs: Runs) -> list[str]:
        """Arms with a run that was looked at, and is another one now."""
        return [
            f"{name} (changed)"
            for name, of in self.runs.items()
            if any(mark and runs.get(name, {}).get(s, mark) != mark for s, mark in of.items())
        ]


def runs_of(plan: Plan, arms: Sequence[Arm], jobs: Sequence[Job]) -> Runs:
    """The runs that verdicts on these arms are from; controls have none."""
    found: Runs = {arm.name: {} for arm in arms if arm.role != "control"}
    for arm in arms:
        if arm.collect and arm.name in found:
            marks = map(adapter_mark, map(Path, arm.collect))
            found[arm.name] = dict(zip(map(str, plan.settings.seeds), marks, strict=True))
    for job in jobs:
        if job.arm.name in found and job.task in ("narrow", GOOD):
            of, seed = found[job.arm.name], str(job.seed)
            of[seed] = digest(of[seed], job.fingerprint) if seed in of else job.fingerprint
    return found


def check_look(
    plan: Plan,
    arms: Sequence[Arm],
    jobs: Sequence[Job],
    rules: Mapping[str, str],
    origin: Origin,
) -> None:
    """See that looks are in their order: what was looked at has spent its part.

    Raises:
        UserError: A last look without a first one; none after a first one; a first one after the
            last, or once more at other runs or by other rules; a last one at other runs than those
            that the first one's verdicts are of.
    """
    settings, where = plan.settings, origin.at("looks.at")
    folder, look = Path(settings.output_dir), settings.look
    first = FirstLook.read(folder) if settings.frozen else None
    if look == COUNT and first is None:
        raise UserError(f"{where}: there was no first look; take it with 1")
    if first is None:
        return
    if look is None:
        raise UserError(
            f"{origin.at('looks')}: a first look was taken on {first.taken}; the next is "
            "looks.at: 2"
        )
    if look < COUNT and first.last:
        raise UserError(
            f"{where}: the last look was taken on {first.last}, and no first one follows it; 2 "
            "shows it again"
        )
    if not first.runs:
        return
    opening = Opening.read(folder / OPENING)
    shown = list(arms) if opening is None else opening.shown(arms)
    runs = runs_of(plan, shown, jobs)
    curve = [arm.name for arm in shown if arm.role in ("undefended", "frontier")]
    if look < COUNT and (other := first.changes(runs, rules)):
        raise UserError(
            f"{where}: the first look was taken on {first.taken}, and these are other now: "
            f"{', '.join(other)}; it is taken once: put them back, or go on with 2"
        )
    if look == COUNT and (other := first.unsettled(runs, curve, rules)):
        raise UserError(
            f"{where}: the first look's verdicts, of {first.taken}, stand for what it looked at, "
            f"and these are other now: {', '.join(other)}; put them back, and give a new training "
            "a name of its own"
        )
