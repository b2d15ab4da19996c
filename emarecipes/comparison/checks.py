"""What of a comparison's evaluations and sampling can be checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from emarecipes.comparison.execute import evaluation_overrides
from emarecipes.comparison.outcome import Half
from emarecipes.comparison.settings import GenerateSettings, Plan, TaskSettings
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.settings import TRAITS_OF, check_eval_settings
from emarecipes.generation.checks import check_generate_settings


def check_tasks(plan: Plan, origin: Origin) -> None:
    """Check the configs by which runs are evaluated and asked, with their overrides.

    Raises:
        UserError: See `check_eval_settings` and `check_generate_settings`.
    """
    if "narrow" in plan.tasks:
        for half in ("select", "report"):
            _check_criteria(plan, origin, half)
    for name, task in plan.tasks.items():
        for half in ("select", "report"):
            _named(origin, f"tasks.{name}.evaluate", _check_evaluation, task, half)
        if task.generate is not None:
            _named(origin, f"tasks.{name}.generate", _check_generation, task.generate)


def _check_criteria(plan: Plan, origin: Origin, half: Half) -> None:
    """Each criterion has its suite in the evaluation: else it is known only after training."""
    task = plan.tasks["narrow"]
    cfg, _ = load_config(["--config", task.evaluate.config, *evaluation_overrides(task, half)])
    probes, traits = list(cfg.get("probes") or {}), list(cfg.get("traits") or [])
    for role, criterion in plan.settings.criteria.given.items():
        where = origin.at(f"criteria.{role}")
        if not criterion.sampled:
            if role != "controls" and criterion.suite not in probes:
                found = ", ".join(map(str, probes)) or "none"
                raise UserError(
                    f"{where}: the evaluation has no probe {criterion.suite}; it has {found}"
                )
            continue
        trait = criterion.figure.removesuffix("_share")
        if trait not in traits:
            raise UserError(f"{where}: `traits` of the evaluation does not name {trait}")
        if task.generate is None:
            raise UserError(f"{where}: is of sampled answers; say how in tasks.narrow.generate")
        asked, _ = load_config(["--config", task.generate.config, *task.generate.overrides])
        suites = [f"{TRAITS_OF}{Path(str(file)).stem}" for file in asked.get("questions") or []]
        if criterion.suite not in suites:
            raise UserError(
                f"{where}: no answers are sampled for {criterion.suite}; there will be "
                f"{', '.join(suites)}"
            )


def _check_evaluation(task: TaskSettings, half: Half) -> None:
    overrides = evaluation_overrides(task, half)
    # A stand-in for the folders of answers that are still to be sampled: a judge asks for some.
    overrides.append("answers.seed=.")
    cfg, own = load_config(["--config", task.evaluate.config, *overrides])
    check_eval_settings(cfg, own)


def _check_generation(generate: GenerateSettings) -> None:
    overrides = [*generate.overrides, "adapter=null"]
    cfg, own = load_config(["--config", generate.config, *overrides])
    check_generate_settings(cfg, own)


def _named(origin: Origin, key: str, check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except UserError as error:
        reason = str(error).replace("command line: ", "overrides: ")
        raise UserError(f"{origin.at(key)}: {reason}") from None
