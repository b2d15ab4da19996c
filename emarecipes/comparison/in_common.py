"""What a whole comparison has in common: one `dtype`, and one day in its prompts.

Arms that are rounded or asked differently do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from emarecipes.clock import today
from emarecipes.comparison.settings import Plan
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.fingerprint import stored
from emarecipes.machine import settle_dtype
from emarecipes.models.chat.dates import reads_clock
from emarecipes.overrides import as_override

DTYPE_FILE, DATE_FILE = "precision.json", "date.json"


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
        settle_dtype(choice, origin, stored(Path(plan.settings.output_dir) / DTYPE_FILE, "dtype"))
        plan.dtype = str(choice.dtype)
    for _, cfg in trained:
        cfg.dtype = plan.dtype
    for task in plan.tasks.values():
        for entry in (task.evaluate, task.generate):
            if entry is None:
                continue
            cfg, _ = load_config(["--config", entry.config, *entry.overrides])
            if cfg.get("dtype", "auto") == "auto":
                entry.overrides.append(as_override("dtype", plan.dtype))


def settle_dates(plan: Plan, trained: Sequence[tuple[str, DictConfig]], origin: Origin) -> None:
    """Put one day where a chat template prints it: for runs, scores and answers.

    It is the one that a config states, or that the comparison was begun with, or today.

    Args:
        plan: The checked config; its tasks' overrides get the day.
        trained: Each training run's arm and config, which gets the day.
        origin: Where the comparison's config was written.

    Raises:
        UserError: Two configs state different ones; one is no day, or has no effect.
    """
    stated: dict[str, str] = {}
    reads: dict[str, bool] = {}  # Of a tokenizer's entry, of which there are few.

    def is_open(key: str, cfg: DictConfig) -> bool:
        entry = cfg.get("tokenizer")
        if str(entry) not in reads:
            reads[str(entry)] = reads_clock(entry, origin.at(key))
        if not reads[str(entry)]:
            return False
        if entry.get("date") is not None:
            stated.setdefault(str(entry.date), key)
        return entry.get("date") is None

    configs = [cfg for arm, cfg in trained if is_open(f"arms.{arm}", cfg)]
    tasks = []
    for name, task in plan.tasks.items() if trained else ():
        for kind, entry in (("evaluate", task.evaluate), ("generate", task.generate)):
            if entry is None:
                continue
            cfg, _ = load_config(["--config", entry.config, *entry.overrides])
            if is_open(f"tasks.{name}.{kind}", cfg):
                tasks.append(entry)
    if len(stated) > 1:
        (first, key), (second, other) = list(stated.items())[:2]
        raise UserError(
            f"{origin.at(other)}: its tokenizer.date is {second}, that of {key} is {first}; a "
            "comparison has one for all"
        )
    if not (configs or tasks or stated):
        return
    begun = stored(Path(plan.settings.output_dir) / DATE_FILE, "date")
    plan.date = next(iter(stated), None) or begun or today()
    for cfg in configs:
        cfg.tokenizer.date = plan.date
    for entry in tasks:
        entry.overrides.append(as_override("tokenizer.date", plan.date))


def keep_common(plan: Plan) -> None:
    """Write down what all have in common, for the machine and the day that goes on with it."""
    folder = Path(plan.settings.output_dir)
    for name, key, value in ((DTYPE_FILE, "dtype", plan.dtype), (DATE_FILE, "date", plan.date)):
        if value is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, {key: value}, indent=None)
