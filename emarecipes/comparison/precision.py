"""One `dtype` for a whole comparison: arms that are rounded differently do not compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from emarecipes.comparison.settings import Plan
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.fingerprint import stored
from emarecipes.machine import settle_dtype

FILE = "precision.json"


def settle_dtypes(plan: Plan, trained: Sequence[tuple[str, DictConfig]], origin: Origin) -> None:
    """Put one dtype where configs leave it to the machine: those of runs, of scores, of answers.

    It is the one that an arm's config states, or that the comparison was begun with, or the
    machine's own.

    Args:
        plan: The checked config; its tasks' overrides get the dtype.
        trained: Each training run's arm and config, which gets the dtype.
        origin: Where the comparison's config was written.

    Raises:
        UserError: Two arms state different ones.
    """
    stated = {str(cfg.dtype): arm for arm, cfg in trained if cfg.get("dtype", "auto") != "auto"}
    if len(stated) > 1:
        (first, arm), (second, other) = list(stated.items())[:2]
        raise UserError(
            f"{origin.at(f'arms.{other}')}: its dtype is {second}, that of {arm} is {first}; a "
            "comparison has one for all: say dtype: auto in their configs"
        )
    if not trained:
        return
    plan.dtype = next(iter(stated), None)
    if plan.dtype is None:
        device = trained[0][1].get("device")
        choice = OmegaConf.create({"device": device, "dtype": "auto"})
        settle_dtype(choice, origin, stored(Path(plan.settings.output_dir) / FILE, "dtype"))
        plan.dtype = str(choice.dtype)
    for _, cfg in trained:
        cfg.dtype = plan.dtype
    for task in plan.tasks.values():
        for entry in (task.evaluate, task.generate):
            if entry is None:
                continue
            cfg, _ = load_config(["--config", entry.config, *entry.overrides])
            if cfg.get("dtype", "auto") == "auto":
                entry.overrides.append(f"dtype={plan.dtype}")


def keep_dtype(plan: Plan) -> None:
    """Write down what the comparison computes in, for the machine that goes on with it."""
    if plan.dtype is not None:
        folder = Path(plan.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {"dtype": plan.dtype}, indent=None)
