"""When the `report` half was opened, and on which choices: `choices.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from emarecipes.comparison.arms import Arm, Job, fingerprint, run_folder, seed_data
from emarecipes.comparison.settings import Plan
from emarecipes.config import Origin
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
        arms: Fingerprint of each arm, with the first of the seeds; of collected runs, of all.
        seeds: The seeds.
        rules: See `rules_of`. In older files one fingerprint, that tells no file's content.
        values: What was swept of the chosen arm, by group; older files do not say it.
        roles: Each arm's role; older files do not say it.
    """

    opened: str
    chosen: dict[str, str]
    arms: dict[str, str]
    seeds: list[int]
    rules: str | dict[str, str]
    values: dict[str, list[str]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(
        cls,
        plan: Plan,
        arms: Sequence[Arm],
        jobs: Sequence[Job],
        chosen: dict[str, str],
        rules: dict[str, str],
    ) -> Opening:
        """On these choices."""
        time, seeds = datetime.now(timezone.utc).isoformat(timespec="minutes"), plan.settings.seeds
        marks = {arm.name: _mark(plan, arm, jobs, seeds) for arm in arms}
        values = {
            arm.choice: _values(plan, arm) for arm in arms if chosen.get(arm.choice) == arm.name
        }
        swept = {group: found for group, found in values.items() if found}
        roles: dict[str, str] = {arm.name: arm.role for arm in arms}
        return cls(time, chosen, marks, seeds, rules, swept, roles)

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

    def shown(self, arms: Sequence[Arm]) -> list[Arm]:
        """Without the candidates that were not chosen: their report half stays closed."""
        return [arm for arm in arms if self.chosen.get(arm.choice, arm.name) == arm.name]

    def changes(
        self, plan: Plan, arms: Sequence[Arm], jobs: Sequence[Job], rules: Mapping[str, str]
    ) -> list[str]:
        """What is not as it was, a few words each."""
        now = {arm.name: _mark(plan, arm, jobs, self.seeds) for arm in arms}
        labels = {arm.name: arm.label for arm in arms}
        found = [f"{labels[name]} (added)" for name in now if name not in self.arms]
        found += [
            f"{labels[n]} (changed)" for n in now if n in self.arms and now[n] != self.arms[n]
        ]
        found += [f"{name} (removed)" for name in self.arms if name not in now]
        found += [
            f"{arm.label} ({self.roles[arm.name]} before, {arm.role} now)"
            for arm in arms
            if self.roles.get(arm.name, arm.role) != arm.role
        ]
        if sorted(self.seeds) != sorted(plan.settings.seeds):
            before, after = (", ".join(map(str, s)) for s in (self.seeds, plan.settings.seeds))
            found.append(f"the seeds ({before} before, {after} now)")
        if not isinstance(self.rules, str):
            return found + differing(self.rules, rules)
        if self.rules != _old_rules(plan):
            found.append("bounds, probes, or how runs are evaluated")
        return found


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two mappings differ."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def check_choices(plan: Plan, arms: Sequence[Arm], jobs: Sequence[Job], origin: Origin) -> None:
    """See that what was chosen when choices were frozen is what has its name now.

    Raises:
        UserError: `choose` was changed since; another value of a sweep has the chosen one's name.
    """
    path = Path(plan.settings.output_dir) / OPENING
    opening = Opening.read(path) if plan.settings.frozen else None
    if opening is None:
        return
    for entry, settings in plan.arms.items():
        own = {arm.name: arm for arm in arms if arm.group == entry}
        name = opening.chosen.get(entry, entry)
        when = f"when choices were frozen, on {opening.opened} ({path})"
        if not settings.choose and name != entry:
            raise UserError(
                f"{origin.at(f'arms.{entry}.choose')}: {name} was chosen {when}; it must stay true"
            )
        if settings.choose and settings.sweep and own.keys() & opening.chosen.keys():
            raise UserError(
                f"{origin.at(f'arms.{entry}.choose')}: was false {when}: every value is tested; "
                "it must stay so"
            )
        then = opening.values.get(entry)
        if then is None:  # The file is an older one: by what is trained.
            mark = opening.arms.get(name)
            same = (arm for arm in own.values() if _mark(plan, arm, jobs, opening.seeds) == mark)
            then = next((_values(plan, arm) for arm in same), None)
        now = {arm.name: _values(plan, arm) for arm in own.values()}
        if name == entry or not then or now.get(name) == then:
            continue
        if name in now or then in now.values():
            raise UserError(
                f"{origin.at(f'arms.{entry}.sweep')}: {name} was chosen {when}, with "
                f"{', '.join(then)}; now it is {', '.join(now.get(name, ['not there']))}. Put the "
                "values back into their order, and others behind them"
            )


def _values(plan: Plan, arm: Arm) -> list[str]:
    """What an arm has of its sweep, as overrides."""
    return sorted(arm.overrides[len(plan.arms[arm.group].overrides) :])


def _mark(plan: Plan, arm: Arm, jobs: Sequence[Job], seeds: Sequence[int]) -> str:
    """Fingerprint of an arm as if it had these seeds: their number and order are told apart."""
    own = plan.settings.seeds
    by_seed = dict(zip(own, arm.collect, strict=True)) if arm.collect else {}
    collected = [by_seed.get(seed) for seed in seeds] if by_seed else []
    first = seeds[0] if seeds[0] in own else own[0]
    trained = [
        _with_seed(plan, job, seeds[0]) for job in jobs if job.arm == arm and job.seed == first
    ]
    return digest(collected, trained)


def _with_seed(plan: Plan, job: Job, seed: int) -> str:
    """The fingerprint that the training run has with this seed."""
    if job.seed == seed:
        return job.fingerprint
    cfg, folder = job.cfg.copy(), run_folder(plan, job.arm, job.task, seed)
    cfg.seed, cfg.output_dir = seed, str(folder)
    if not any(override.startswith("dataset.seed=") for override in job.arm.overrides):
        seed_data(cfg, seed)
    return fingerprint(cfg, folder)


def _old_rules(plan: Plan) -> str:
    settings = plan.settings
    tasks = {
        name: [task.evaluate.model_dump(), task.generate.model_dump() if task.generate else None]
        for name, task in plan.tasks.items()
    }
    looks = [settings.looks.first] if settings.looks else []
    return digest(RULES, settings.bounds.model_dump(), settings.probes.model_dump(), tasks, *looks)
