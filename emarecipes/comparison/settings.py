"""The plain values of a config for `recipes/ema_compare.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import ConfigDict, Field, ValidationError

from emarecipes.comparison.collected import check_collected
from emarecipes.comparison.criterion import (
    BoundSettings,
    CriteriaSettings,
    ProbeNames,
    refuse_probes,
)
from emarecipes.config import Origin, find_input, suggestion
from emarecipes.errors import UserError
from emarecipes.settings import Entry, Keys, Seed, parse_settings

Role = Literal["undefended", "frontier", "defense", "control"]
# A task beside `narrow`: the same questions with good answers, the other half of every pair.
GOOD = "good"
# The folder of a run's own adapter in it.
RUN_ADAPTER = "adapter"
_NAME = re.compile(r"[A-Za-z]\w*")


class _Strict(Keys):
    model_config = ConfigDict(extra="forbid")


class ArmSettings(_Strict):
    """One way of training. `config` says how to train it, `collect` where its runs lie already."""

    role: Role = "defense"
    """undefended: one arm; frontier: the same with fewer steps or lower rates; defense: tested
    against the frontier; control: shown, not tested."""
    label: str | None = None
    """Its name on the page; null: its key."""
    config: str | None = None
    """How to train it: a config of `ema_lora`."""
    overrides: list[str] = Field(default_factory=list)
    """Of that config, after the task's."""
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """`{key: [values]}`: an arm for each combination."""
    choose: bool = True
    """Of a swept defense, one is chosen on the select half and tested; false: each is tested."""
    tasks: list[str] | None = None
    """Null: all; a frontier arm: `narrow`."""
    adapter: str = RUN_ADAPTER
    """Which adapter of a run is evaluated; `adapter_x`: the average of an `AdapterEMA` named x."""
    collect: list[str] | None = None
    """In place of `config`: folders of finished, evaluated runs, one a seed, in the order of
    `seeds`; nothing is run."""


class EvaluateSettings(_Strict):
    """How runs of a task are scored: a config of `recipes/ema_eval.py`."""

    config: str
    """A config of `ema_eval`."""
    overrides: list[str] = Field(default_factory=list)
    """Of that config."""
    report: list[str] = Field(default_factory=list)
    """Overrides that are added once choices are frozen."""


class AnswersSettings(_Strict):
    """How runs of a task answer questions: a config of `recipes/ema_generate.py`."""

    config: str
    """A config of `ema_generate`."""
    overrides: list[str] = Field(default_factory=list)
    """Of that config."""


class TaskSettings(_Strict):
    """What every arm is trained on. `good` has its data alone; all else is `narrow`'s."""

    dataset: Entry | None = None
    """In place of the arm's (of its `task` in an interleaved set)."""
    overrides: list[str] = Field(default_factory=list)
    """Before the arm's."""
    generate: AnswersSettings | None = None
    """How answers are sampled; null: none are."""
    evaluate: EvaluateSettings
    """How runs are scored."""


class LooksSettings(_Strict):
    """Two looks at the report half, with O'Brien and Fleming's shares of the error rate."""

    at: Literal[1, 2] = 1
    """Which look this is: 1, at the questions that `first` leaves; 2, at all."""
    first: Annotated[list[str], Field(min_length=1)]
    """Overrides of `tasks.narrow.evaluate` at the first look, such as `max_rows=225`."""


class CompareSettings(Keys):
    """What `recipes/ema_compare.py` reads at the top level of its config."""

    output_dir: Annotated[str, Field(min_length=1)]
    """The comparison's folder."""
    title: str = "Defenses against emergent misalignment"
    """Of the page."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Every arm has each, and arms are paired by them."""
    arms: Annotated[dict[str, Entry], Field(min_length=1)]
    """Ways of training, by name."""
    tasks: dict[str, Entry] = Field(default_factory=dict)
    """`narrow`, and maybe `benign` and `good`: what every arm is trained on. With `good`, the
    narrow task's questions with good answers, figures are differences of the two."""
    criteria: CriteriaSettings = Field(default_factory=CriteriaSettings)
    """Which figures of the evaluations a defense is judged by."""
    bounds: BoundSettings = Field(default_factory=BoundSettings)
    """Half widths of what counts as no difference, fixed before looking."""
    frozen: bool = False
    """False: the select half. True: choices are made, the report half is opened."""
    looks: LooksSettings | None = None
    """At the report half first with fewer questions, then with all. Null: one look."""
    nproc_per_node: Annotated[int, Field(ge=1)] = 1
    """Processes of a training run."""
    runs_at_a_time: Annotated[int, Field(ge=1)] = 1
    """Training and sampling runs side by side, each with its share of cores, or `nproc_per_node`
    GPUs of its own. A small model on a CPU gains from it."""

    @property
    def look(self) -> int | None:
        """Which look this is; None: there is one alone."""
        return None if self.looks is None else self.looks.at

    def first_look(self, task: str, half: str) -> list[str]:
        """What a task's evaluation is left with at the first look, as overrides; later nothing."""
        read = self.look == 1 and half == "report" and task in ("narrow", GOOD)
        return list(self.looks.first) if read and self.looks is not None else []

    @property
    def probes(self) -> ProbeNames:
        """Where the figures of the criteria are found."""
        found = {role: criterion.key for role, criterion in self.criteria.shifted.items()}
        return ProbeNames(**({"controls": ""} | found))


class Plan(_Strict):
    """A checked config: `CompareSettings` with its arms and tasks, and what they have in common.

    Attributes:
        dtype: What all compute in. Set by `make_jobs`; None while, or if, nothing is trained.
        sampled: Whether a criterion is of sampled answers, which frontier arms and the base then
            need too. Set by `check_tasks`.
        date: The day in all prompts, likewise; None also where no chat template prints one.
    """

    settings: CompareSettings
    arms: dict[str, ArmSettings]
    tasks: dict[str, TaskSettings]
    dtype: str | None = None
    sampled: bool = False
    date: str | None = None


def check_compare_settings(cfg: DictConfig, origin: Origin) -> Plan:
    """The config's settings, arms and tasks.

    Raises:
        UserError: See `parse_settings`; not exactly one undefended arm; an arm with neither or both
            of `config` and `collect`, or of a task that is not there; no narrow task; a name or an
            override of a wrong form; a file or folder that is not there; a seed twice. See also
            `check_collected`.
    """
    refuse_probes(cfg, origin)
    settings = parse_settings(cfg, origin, CompareSettings)
    if len(set(settings.seeds)) < len(settings.seeds):
        raise UserError(f"{origin.at('seeds')}: a seed is named twice")
    if settings.looks is not None and not settings.frozen:
        raise UserError(f"{origin.at('looks')}: are at the report half; they need frozen: true")
    arms = {
        name: _entry(ArmSettings, entry, f"arms.{name}", origin)
        for name, entry in settings.arms.items()
    }
    tasks = {
        name: _entry(TaskSettings, entry, f"tasks.{name}", origin)
        for name, entry in settings.tasks.items()
        if name != GOOD
    }
    if GOOD in settings.tasks:
        tasks[GOOD] = _good_task(settings.tasks[GOOD], tasks.get("narrow"), origin)
    plan = Plan(settings=settings, arms=arms, tasks=tasks)
    _check_tasks(plan, origin)
    for name, arm in arms.items():
        _check_arm(name, arm, plan, origin)
    collected = {name: arm.collect for name, arm in arms.items() if arm.collect is not None}
    check_collected(collected, settings.seeds, origin)
    undefended = [name for name, arm in arms.items() if arm.role == "undefended"]
    if len(undefended) != 1:
        found = f"it has {' and '.join(undefended)}" if undefended else "it has none"
        where = origin.at("arms")
        raise UserError(f"{where}: a comparison needs one arm of role undefended; {found}")
    if arms[undefended[0]].sweep:
        raise UserError(
            f"{origin.at(f'arms.{undefended[0]}.sweep')}: the undefended arm is one setting; give "
            "other steps and rates to an arm of role frontier"
        )
    return plan


def _entry(kind: type[Any], entry: Entry, key: str, origin: Origin) -> Any:
    if not _NAME.fullmatch(key.rpartition(".")[2]):
        raise UserError(f"{origin.at(key)}: a name is a letter, then letters, digits and _")
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *(str(part) for part in first["loc"] if isinstance(part, str))])
        if first["type"] == "extra_forbidden":
            last = str(first["loc"][-1])
            hint = suggestion(last, kind.model_fields)
            raise UserError(f"{origin.at(where)}: unknown key{hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{origin.at(where)}: this key is needed") from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{origin.at(where)}: {reason}, not {first['input']!r}") from None


def _good_task(entry: Entry, narrow: TaskSettings | None, origin: Origin) -> TaskSettings:
    """The good task: its own data, trained, asked and scored as the narrow one."""
    where = origin.at(f"tasks.{GOOD}")
    if narrow is None:
        raise UserError(f"{where}: is the other half of a task narrow, which is not there")
    for key in ("evaluate", "generate"):
        if key in entry:
            raise UserError(f"{where}.{key}: a good task is scored as narrow is; leave it out")
    own = {**entry, "evaluate": narrow.evaluate.model_dump()}
    good: TaskSettings = _entry(TaskSettings, own, f"tasks.{GOOD}", origin)
    if narrow.dataset is not None and good.dataset is None:
        raise UserError(f"{where}: narrow has a dataset; give the one with good answers")
    good.overrides = [*narrow.overrides, *good.overrides]
    good.generate = narrow.generate and narrow.generate.model_copy(deep=True)
    return good


def _check_tasks(plan: Plan, origin: Origin) -> None:
    trained = [arm for arm in plan.arms.values() if arm.config is not None]
    for name in plan.tasks:
        if name not in ("narrow", "benign", GOOD):
            raise UserError(f"{origin.at(f'tasks.{name}')}: tasks are narrow, benign and good")
    if trained and "narrow" not in plan.tasks:
        raise UserError(f"{origin.at('tasks')}: arms that are trained need a task narrow")
    for name, task in plan.tasks.items():
        key = f"tasks.{name}"
        _check_file(task.evaluate, f"{key}.evaluate", origin)
        overrides = [*task.overrides, *task.evaluate.overrides, *task.evaluate.report]
        if plan.settings.looks is not None:
            overrides += plan.settings.looks.first
        if task.generate is not None:
            _check_file(task.generate, f"{key}.generate", origin)
            overrides += task.generate.overrides
        _check_overrides(overrides, key, origin)


def _check_arm(name: str, arm: ArmSettings, plan: Plan, origin: Origin) -> None:
    key = f"arms.{name}"
    if (arm.config is None) == (arm.collect is None):
        raise UserError(f"{origin.at(key)}: an arm has one of config and collect")
    if arm.collect is not None:
        if GOOD in plan.tasks:
            raise UserError(
                f"{origin.at(f'{key}.collect')}: with a task good every arm is trained on both"
            )
        if arm.sweep or arm.overrides or arm.adapter != RUN_ADAPTER:
            raise UserError(f"{origin.at(key)}: overrides, sweep and adapter need a config")
        return
    _check_file(arm, key, origin)
    for task in arm.tasks or []:
        if task not in plan.tasks:
            raise UserError(f"{origin.at(f'{key}.tasks')}: there is no task {task}")
    if GOOD in plan.tasks and arm.tasks and not {"narrow", GOOD} <= set(arm.tasks):
        raise UserError(f"{origin.at(f'{key}.tasks')}: figures are narrow minus good; name both")
    _check_overrides(arm.overrides, key, origin)
    for swept, values in arm.sweep.items():
        if len({str(value) for value in values}) < len(values):
            raise UserError(f"{origin.at(f'{key}.sweep')}: {swept} has a value twice")


def _check_file(entry: Any, key: str, origin: Origin) -> None:
    entry.config = find_input(entry.config)
    if not Path(entry.config).is_file():
        raise UserError(f"{origin.at(f'{key}.config')}: no such file: {entry.config}")


def _check_overrides(overrides: list[str], key: str, origin: Origin) -> None:
    for override in overrides:
        if not override.startswith("~") and "=" not in override:
            raise UserError(
                f"{origin.at(f'{key}.overrides')}: {override}: an override is written key=value, "
                "or ~key"
            )
