"""The value of an override `key=value`: read from its text, and written so that it is read back."""

import math
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class _Quoting(yaml.SafeDumper):
    """Quotes every text: which plain ones are numbers, OmegaConf and YAML do not agree on."""


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def read_value(key: str, text: str) -> Any:
    """The value that an override's text means: YAML's, and as torchtune has it `None` is null.

    Raises:
        yaml.YAMLError, OmegaConfBaseException: It means none.
    """
    if text == "None":
        return None
    if _is_raw(key):
        return text
    plain: Any = OmegaConf.to_container(_parsed(text))  # Interpolations as written.
    return plain["x"]


def as_override(key: str, value: Any) -> str:
    """`key=value` that is read back as this value.

    It is `str(value)` where that is read back so, as most paths and numbers are, else YAML on one
    line with every text in quotes. `${` in a text begins an interpolation, in quotes or not.

    Args:
        key: What to set.
        value: A text, a path (read back as text), a number, a boolean, None, or lists and mappings
            of these.
    """
    value = str(value) if isinstance(value, Path) else value
    text = str(value)
    if not _is_raw(key) and not _is_read_as(text, value):
        # In a list, as YAML marks the end of a document that is one plain scalar.
        line = yaml.dump([value], Dumper=_Quoting, default_flow_style=True, width=math.inf,
                         allow_unicode=True, sort_keys=False)  # fmt: skip
        text = line.rstrip("\n")[1:-1]
    return f"{key}={text}"


def _is_raw(key: str) -> bool:
    """Whether torchtune takes what is given for a key as it stands: 00004 is no number there."""
    return "max_filename" in key


def _parsed(text: str) -> DictConfig:
    return OmegaConf.from_dotlist([f"x={text}"])


def _is_read_as(text: str, value: Any) -> bool:
    """Whether the text is read as the value and as its type, with interpolations as written."""
    if text == "None":
        return value is None
    try:
        yaml.compose(text, Loader=yaml.SafeLoader)  # As `load_config` looks at it beforehand.
        plain: Any = OmegaConf.to_container(_parsed(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return False
    return repr(plain["x"]) == repr(value)  # 1, 1.0 and True are equal, nan is not.
