"""What an adapter was trained with, and what it is asked with: the base, and the form of talk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from emarecipes.errors import UserError
from emarecipes.fingerprint import sampled_digest
from emarecipes.models.adapters.files import read_adapter_config

log = utils.get_logger("INFO")

TEMPLATE_FILE = "chat_template.jinja"


def template_text(given: str) -> str:
    """A config's `chat_template`: Jinja text, or a file of it whose name ends in `.jinja`."""
    return Path(given).read_text(encoding="utf-8") if given.endswith(".jinja") else given


def check_origin(adapter: Path, cfg: DictConfig, where: str) -> None:
    """Tell what `warn_of_another_form` and `warn_of_another_base` find.

    Args:
        adapter: The adapter's folder, checked.
        cfg: The config, with `tokenizer` and `checkpointer`.
        where: The adapter's place in it.
    """
    warn_of_another_form(adapter, cfg.tokenizer, where)
    warn_of_another_base(adapter, Path(str(cfg.checkpointer.checkpoint_dir)), where)


def have_same_weights(one: Path, other: Path) -> bool:
    """Whether two folders are one, or their safetensors files are, by a digest of samples."""
    if one.resolve() == other.resolve():
        return True
    found = [sampled_digest(sorted(folder.glob("*.safetensors"))) for folder in (one, other)]
    return found[0] == found[1]


def check_same_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter whose own base is there and holds other weights.

    Raises:
        UserError: So it is.
    """
    trained = Path(str(read_adapter_config(adapter).get("base_model_name_or_path")))
    if trained.is_dir() and not have_same_weights(trained, base):
        raise UserError(
            f"{adapter} was trained on {trained}, whose weights are not those of {base}"
        )


def warn_of_another_base(adapter: Path, base: Path, where: str) -> None:
    """Say so where an adapter is put on other weights than those it was trained on.

    Shapes do not tell: a base and its instruction-tuned model have the same. A folder that is still
    there is compared by its weights, any other base by its name.

    Args:
        adapter: The adapter's folder.
        base: The base model's folder.
        where: The adapter's place in the config.
    """
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    trained, given = Path(str(named)), base.resolve()
    if trained.is_dir():
        same = have_same_weights(trained, given)
    else:
        same = not named or trained.name.lower() == given.name.lower()
    if not same:
        utils.log_rank_zero(
            log,
            f"{where}: {adapter} was trained on {named}, and is put on {base} here: if that is "
            "another model, so is the sum of both",
            level=logging.WARNING,
        )


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
        forms = [_form(entry) for entry in (trained, tokenizer)]
    except (OSError, ValueError, AttributeError):
        return  # Not a run's folder, or a template that has gone.
    different = [key for key in forms[0] if forms[0][key] != forms[1][key]]
    if not different:
        return
    key = different[0]
    was, now = (form[key] for form in forms)
    utils.log_rank_zero(
        log,
        f"{where}: {adapter} was trained with tokenizer.{key} {was:.60}, and is asked here with "
        f"{now:.60}: in another form than it was trained in",
        level=logging.WARNING,
    )


def _form(tokenizer: Any) -> dict[str, str]:
    """What of a config's `tokenizer` shapes a conversation, as text."""
    template, arguments = (tokenizer.get(key) for key in ("chat_template", "template_arguments"))
    given = OmegaConf.to_container(arguments) if OmegaConf.is_config(arguments) else arguments
    return {
        "_component_": str(tokenizer.get("_component_")),
        "chat_template": template_text(str(template)) if template else "the folder's own",
        "template_arguments": json.dumps(given, sort_keys=True) if given else "none",
    }
