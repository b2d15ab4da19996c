"""One day for the prompts of a whole comparison: arms that are asked differently do not compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from emarecipes.clock import today
from emarecipes.comparison.settings import Plan
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.fingerprint import stored
from emarecipes.models.chat.dates import reads_clock

FILE = "date.json"


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

    def is_open(key: str, cfg: DictConfig) -> bool:
        entry = cfg.get("tokenizer")
        if not reads_clock(entry, origin.at(key)):
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
    begun = stored(Path(plan.settings.output_dir) / FILE, "date")
    plan.date = next(iter(stated), None) or begun or today()
    for cfg in configs:
        cfg.tokenizer.date = plan.date
    for entry in tasks:
        entry.overrides.append(f"tokenizer.date={plan.date}")


def keep_date(plan: Plan) -> None:
    """Write down the day in the comparison's prompts, for another day that goes on with it."""
    if plan.date is not None:
        folder = Path(plan.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {"date": plan.date}, indent=None)
