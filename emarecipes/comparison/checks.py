"""What of a comparison's evaluations and sampling can be checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emarecipes.comparison.execute import evaluation_overrides
from emarecipes.comparison.outcome import Half
from emarecipes.comparison.settings import GenerateSettings, Plan, TaskSettings
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.settings import check_eval_settings
from emarecipes.generation.checks import check_generate_settings


def check_tasks(plan: Plan, origin: Origin) -> None:
    """Check the configs by which runs are evaluated and asked, with their overrides.

    Raises:
        UserError: See `check_eval_settings` and `check_generate_settings`.
    """
    for name, task in plan.tasks.items():
        for half in ("select", "report"):
            _named(origin, f"tasks.{name}.evaluate", _check_evaluation, task, half)
        if task.generate is not None:
            _named(origin, f"tasks.{name}.generate", _check_generation, task.generate)


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
