"""The day that a chat template prints: chosen once, written down, kept by all that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from omegaconf import DictConfig
from torchtune import utils

from emarecipes.components import locate
from emarecipes.config import Origin, find_input
from emarecipes.errors import UserError
from emarecipes.models.chat.tokenizer import HFChatTokenizer, hf_chat_tokenizer, printed_day

log = utils.get_logger("INFO")

_TEMPLATE_KEYS = ("path", "chat_template", "date", "template_arguments")


def settle_date(cfg: DictConfig, origin: Origin, kept: Mapping[str, str | None]) -> None:
    """Put into `tokenizer.date` the day that its chat template prints, and say which and why.

    It is the config's own, or that of what goes on, or today. Nothing is put where the template
    reads no clock, or the tokenizer is not `hf_chat_tokenizer`.

    Args:
        cfg: With `tokenizer`, perhaps.
        origin: Where it was written.
        kept: The day of each thing that is gone on with or built on, by its key; None if it has
            none.

    Raises:
        UserError: The config's is no day, or has no effect; those of `kept` differ, and the config
            has none.
    """
    entry = cfg.get("tokenizer")
    if not reads_clock(entry, origin.at("tokenizer")) or entry.get("date") is not None:
        return
    known = {key: day for key, day in kept.items() if day is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"that of {key} is {day}" for key, day in known.items())
        raise UserError(
            f"{origin.at('tokenizer')}: the chat template prints a date, and {said}; say which as "
            "tokenizer.date"
        )
    entry.date = next(iter(known.values()), None) or printed_day(**_arguments(entry))
    if not dist.is_initialized() or dist.get_rank() == 0:
        why = f"as {next(iter(known))} has it" if known else "today; the chat template prints it"
        log.info(f"tokenizer.date: {entry.date} ({why})")


def reads_clock(entry: Any, where: str) -> bool:
    """Whether a config's tokenizer has a chat template that reads the clock.

    Args:
        entry: The config's `tokenizer`; None if it has none.
        where: The place, for messages.

    Raises:
        UserError: Its `date` is no day, or has no effect; its folder or template is broken.
    """
    component = None if entry is None else entry.get("_component_")
    if component is None:
        return False
    if locate(str(component), where) not in (hf_chat_tokenizer, HFChatTokenizer):
        return False
    path = Path(str(entry.get("path")))
    if not (path.is_file() or (path / "tokenizer.json").is_file()):
        return False  # For whoever checks paths to say.
    try:
        return printed_day(**_arguments(entry)) is not None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def adapter_date(adapter: str | Path | None) -> str | None:
    """The day in the prompts that an adapter was trained on, from its run's `config.yaml`.

    Args:
        adapter: A run's `adapter/`. One that was projected after training has its original's.
    """
    seen: set[Path] = set()
    while adapter is not None:
        config = Path(find_input(str(adapter))).resolve().parent / "config.yaml"
        if config in seen:
            return None
        seen.add(config)
        try:
            found = yaml.safe_load(config.read_text(encoding="utf-8"))
            if "tokenizer" in found:
                return _day(found)
            adapter = found.get("adapter")
        except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError):
            return None
    return None


def answers_dates(folder: Path) -> dict[str, str]:
    """The day in the prompts of each suite in a folder of answers, where its settings name one."""
    return _dates(folder.glob("*.json"), lambda found: _day(found["config"]))


def check_answers_dates(folders: Mapping[str, str], origin: Origin) -> dict[str, str | None]:
    """The day in the prompts of answers that are scored together, by the key of their folder.

    Args:
        folders: Each folder of answers, by its name in the entry `answers`.
        origin: Where it was written.

    Raises:
        UserError: They were sampled from prompts of different days.
    """
    found: dict[str, str | None] = {}
    for name, folder in folders.items():
        for file, day in answers_dates(Path(folder)).items():
            other = next(iter(found.items()), (file, day))
            if day != other[1]:
                raise UserError(
                    f"{origin.at(f'answers.{name}')}: {file} has answers to prompts of {day}, "
                    f"{other[0]} of {other[1]}; sample one anew with the other's tokenizer.date"
                )
            found[f"answers.{name}"] = day
    return found


def cache_date(folder: str | Path | None) -> str | None:
    """The latest day among a reference cache's."""
    if folder is None:
        return None
    found = _dates(Path(folder).glob("*/key.json"), lambda key: key["date"])
    return max(found.values(), default=None)


def _dates(files: Iterable[Path], read: Any) -> dict[str, str]:
    """By the files' stems; a broken file is for whoever compares what is in it to tell."""
    found = {}
    for file in sorted(files):
        try:
            day = read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if day is not None:
            found[str(file)] = str(day)
    return found


def _day(config: Any) -> str | None:
    day = (config.get("tokenizer") or {}).get("date")
    return None if day is None else str(day)


def _arguments(entry: Any) -> dict[str, Any]:
    return {key: entry.get(key) for key in _TEMPLATE_KEYS}
