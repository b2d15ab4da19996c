"""The form of conversations: what a run was trained in goes with it, and another one is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

log = utils.get_logger("INFO")

TEMPLATE_FILE = "chat_template.jinja"


def template_text(given: str) -> str:
    """A config's `chat_template`: Jinja text, or a file of it whose name ends in `.jinja`."""
    return Path(given).read_text(encoding="utf-8") if given.endswith(".jinja") else given


def warn_of_another_form(adapter: Path, tokenizer: DictConfig, where: str) -> None:
    """Say so where an adapter is asked with another tokenizer or template than it was trained with.

    Which one it was stands in `config.yaml` beside a run's adapter. Trained in one form and asked
    in another, a model may look cleaner, or worse, than it is.

    Args:
        adapter: The adapter's folder.
        tokenizer: The config's entry that it is asked with.
        where: The adapter's place in the config.
    """
    config = adapter.parent / "config.yaml"
    try:
        run: Any = OmegaConf.load(config)
        trained = run.get("tokenizer") or {}
        forms = [
            (str(entry.get("_component_")), template and template_text(str(template)))
            for entry in (trained, tokenizer)
            for template in [entry.get("chat_template")]
        ]
    except (OSError, ValueError, AttributeError):
        return  # Not a run's folder, or a template that has gone.
    if forms[0] == forms[1]:
        return
    key, place = ("_component_", 0) if forms[0][0] != forms[1][0] else ("chat_template", 1)
    was, now = (form[place] or "the folder's own" for form in forms)
    utils.log_rank_zero(
        log,
        f"{where}: {adapter} was trained with tokenizer.{key} {was:.60}, and is asked here with "
        f"{now:.60}: in another form than it was trained in",
        level=logging.WARNING,
    )
