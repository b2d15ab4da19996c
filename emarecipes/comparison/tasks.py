"""What of a comparison's evaluations and sampling can be checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from emarecipes.comparison.criterion import SHARE, CriterionSettings
from emarecipes.comparison.execute import evaluation_overrides
from emarecipes.comparison.outcome import Half
from emarecipes.comparison.settings import GOOD, AnswersSettings, Plan, TaskSettings
from emarecipes.config import Origin, find_input, load_config, suggestion
from emarecipes.errors import UserError
from emarecipes.evaluation.settings import check_eval_settings, named_suites
from emarecipes.evaluation.suite import Suite
from emarecipes.generation.checked import asked_suites, check_generate_settings

T = TypeVar("T")


def check_tasks(plan: Plan, origin: Origin) -> None:
    """Check the configs by which runs are evaluated and asked, with their overrides.

    Raises:
        UserError: See `check_eval_settings` and `check_generate_settings`; a criterion whose figure
            no evaluation would give.
    """
    for name, task in plan.tasks.items():
        if name == GOOD:  # As narrow's.
            continue
        if task.generate is not None:
            _named(origin, f"tasks.{name}.generate", _check_generation, task.generate)
        for half in ("select", "report"):
            fewer = plan.settings.first_look(name, half)
            suites = _named(origin, f"tasks.{name}.evaluate", _suites, task, half, fewer)
            check_criteria(plan, origin, name, suites)


def _suites(task: TaskSettings, half: Half, fewer: Sequence[str]) -> list[Suite]:
    """The suites of an evaluation, its config checked."""
    overrides = [*evaluation_overrides(task, half), *fewer]
    # A stand-in for the folders of answers that are still to be sampled: a judge asks for some.
    overrides.append("answers.seed=.")
    cfg, own = load_config(["--config", task.evaluate.config, *overrides])
    return named_suites(check_eval_settings(cfg, own), own)


def check_criteria(plan: Plan, origin: Origin, task: str, suites: Sequence[Suite]) -> None:
    """See that each criterion of a task has its figure: else it is known only after training.

    Puts into the plan whether answers are needed for a shift.

    Args:
        plan: The checked config.
        origin: Where it was written.
        task: `narrow`, whose criteria are all but one, or `benign`.
        suites: Of its evaluation.

    Raises:
        UserError: A suite or a figure is not there, or its answers are not sampled; controls have
            another unit than general's figure; benign or coherent are no share.
    """
    criteria = plan.settings.criteria
    if task == "benign":
        _check_share(plan, origin, task, "benign", criteria.benign, suites)
        return
    units: dict[str, set[str]] = {}
    for role, criterion in criteria.shifted.items():
        units[role] = _units(plan, origin, task, role, criterion, suites)
        plan.sampled |= any(s.needs_answers for s in suites if s.is_named(criterion.suite))
    _check_share(plan, origin, task, "coherent", criteria.coherent, suites)
    if units.get("controls") and units["general"] and units["controls"] != units["general"]:
        figures = [found.figure for found in (criteria.controls, criteria.general) if found]
        raise UserError(
            f"{origin.at('criteria.controls')}: {figures[0]} and general's {figures[1]} have "
            "different units; name another, or null"
        )


def _check_share(
    plan: Plan,
    origin: Origin,
    task: str,
    role: str,
    criterion: CriterionSettings,
    suites: Sequence[Suite],
) -> None:
    """See that a figure that is told as a share, with a bound that is one, is a share."""
    for unit in _units(plan, origin, task, role, criterion, suites) - {SHARE}:
        raise UserError(
            f"{origin.at(f'criteria.{role}')}.figure: {criterion.figure} is in {unit}; "
            "it must be a share of answers"
        )


def _units(
    plan: Plan,
    origin: Origin,
    task: str,
    role: str,
    criterion: CriterionSettings,
    suites: Sequence[Suite],
) -> set[str]:
    """The figure's unit, where that is known before it is computed."""
    where = origin.at(f"criteria.{role}")
    # What nobody asked for may be lacking: then it is not measured.
    asked = role in plan.settings.criteria.model_fields_set or role in ("general", "in_domain")
    found = [suite for suite in suites if suite.is_named(criterion.suite)]
    if not found and asked:
        names = ", ".join(suite.name for suite in suites)
        raise UserError(f"{where}: the evaluation has no suite {criterion.suite}; it has {names}")
    for suite in found if asked else ():
        known = suite.units()
        if known is not None and criterion.figure not in known:
            hint = suggestion(criterion.figure, known) or f"; it has {', '.join(known)}"
            raise UserError(
                f"{where}.figure: the suite {criterion.suite} has no figure "
                f"{criterion.figure}{hint}"
            )
        if suite.needs_answers:
            _check_sampled(plan, where, task, suite, criterion, several=role == "coherent")
    all_units = [suite.units() for suite in found]
    return {known[criterion.figure] for known in all_units if known and criterion.figure in known}


def _check_sampled(
    plan: Plan, where: str, task: str, suite: Suite, criterion: CriterionSettings, several: bool
) -> None:
    """See that answers are sampled for a criterion's suite."""
    generate = plan.tasks[task].generate
    if generate is None:
        raise UserError(f"{where}: is of sampled answers; say how in tasks.{task}.generate")
    cfg, _ = load_config(["--config", generate.config, *generate.overrides])
    files = [Path(find_input(str(file))) for file in cfg.get("questions") or []]
    stems = [name for file in files for name in asked_suites(file, cfg.get("conditions") or {})]
    names = [suite.named_part(stem) for stem in stems]
    if criterion.suite not in names and not (several and criterion.suite == suite.name):
        raise UserError(
            f"{where}: no answers are sampled for {criterion.suite}; there will be "
            f"{', '.join(names)}"
        )


def _check_generation(generate: AnswersSettings) -> None:
    overrides = [*generate.overrides, "adapter=null"]
    cfg, own = load_config(["--config", generate.config, *overrides])
    check_generate_settings(cfg, own)


def _named(origin: Origin, key: str, check: Callable[..., T], *arguments: Any) -> T:
    try:
        return check(*arguments)
    except UserError as error:
        reason = str(error).replace("command line: ", "overrides: ")
        raise UserError(f"{origin.at(key)}: {reason}") from None
