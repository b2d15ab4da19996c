"""When the `report` half was opened, and on which choices: `choices.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from emarecipes.comparison.arms import Arm, Job
from emarecipes.comparison.settings import Plan
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.fingerprint import digest

OPENING = "choices.json"
# Version of the rules behind verdicts. 2: only where undefended training does something; the bound
# is a share of that; a difference goes before equivalence; coherence by rule and likelihood. 3: the
# seeds' spread is at least that of all tested defenses.
RULES = 3


@dataclass(frozen=True)
class Opening:
    """The state of a comparison when its `report` half was opened.

    Attributes:
        opened: Time, ISO 8601.
        chosen: The arm of each defense, by group.
        arms: Fingerprint of each arm, but for seeds.
        seeds: The seeds.
        rules: Fingerprint of bounds, probes, and how runs are evaluated and asked.
    """

    opened: str
    chosen: dict[str, str]
    arms: dict[str, str]
    seeds: list[int]
    rules: str

    @classmethod
    def now(
        cls, plan: Plan, arms: Sequence[Arm], jobs: Sequence[Job], chosen: dict[str, str]
    ) -> Opening:
        """On these choices."""
        time = datetime.now(timezone.utc).isoformat(timespec="minutes")
        marks = {arm.name: _mark(plan, arm, jobs) for arm in arms}
        return cls(time, chosen, marks, plan.settings.seeds, _rules(plan))

    @classmethod
    def read(cls, path: Path) -> Opening | None:
        """None if there is no such file.

        Raises:
            UserError: It is broken.
        """
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{path}: broken; it says which choices the report half was opened on. Restore it, "
                "or delete it and say in your report that the half was opened before"
            ) from None

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self), indent=1)

    def changes(self, plan: Plan, arms: Sequence[Arm], jobs: Sequence[Job]) -> list[str]:
        """What is not as it was, a few words each."""
        now = {arm.name: _mark(plan, arm, jobs) for arm in arms}
        labels = {arm.name: arm.label for arm in arms}
        found = [f"{labels[name]} (added)" for name in now if name not in self.arms]
        found += [
            f"{labels[n]} (changed)" for n in now if n in self.arms and now[n] != self.arms[n]
        ]
        found += [f"{name} (removed)" for name in self.arms if name not in now]
        if self.seeds != plan.settings.seeds:
            before, after = (", ".join(map(str, s)) for s in (self.seeds, plan.settings.seeds))
            found.append(f"the seeds ({before} before, {after} now)")
        if self.rules != _rules(plan):
            found.append("bounds, probes, or how runs are evaluated")
        return found


def _mark(plan: Plan, arm: Arm, jobs: Sequence[Job]) -> str:
    first = plan.settings.seeds[0]
    trained = [job.fingerprint for job in jobs if job.arm == arm and job.seed == first]
    return digest(list(arm.collect), trained)


def _rules(plan: Plan) -> str:
    settings = plan.settings
    tasks = {
        name: [task.evaluate.model_dump(), task.generate.model_dump() if task.generate else None]
        for name, task in plan.tasks.items()
    }
    looks = [settings.looks.first] if settings.looks else []
    return digest(RULES, settings.bounds.model_dump(), settings.probes.model_dump(), tasks, *looks)
