"""Keeps keys and tokens out of files and messages: a config that holds one is refused, and a
provider's error is shown without it.

The libraries that need a key (wandb, Hugging Face, judges' providers) read it from the environment
themselves. A config that reads it too would be written, resolved, into the run's folder.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from emarecipes.errors import UserError

_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PASS$", re.IGNORECASE
)
# TOKENIZERS_PARALLELISM, MAX_NEW_TOKENS, XKB_DEFAULT_KEYMAP: words that only look like one.
_HARMLESS = re.compile(
    r"TOKENI[SZ]E|KEY(BOARD|MAP)|(MAX|MIN|NEW|NUM|N)_TOKENS?|TOKENS?_PER", re.IGNORECASE
)
_READS_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)")
# Shorter values ("1", "yes") would be found in ordinary settings.
_SHORTEST = 8


def texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key and the text of every string of a tree; keys that are strings included."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            below = f"{key}.{name}" if key else str(name)
            yield below, str(name)
            yield from texts(value, below)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from texts(value, f"{key}.{index}")


def is_secret(name: str) -> bool:
    """Whether an environment variable of that name is taken to hold a secret."""
    return _SECRET_NAME.search(_HARMLESS.sub("", name)) is not None


def masked(text: str) -> str:
    """A text with `***` in place of the environment's secrets."""
    # The longest first: one may be a part of another.
    for _, value in sorted(_secrets(), key=lambda secret: -len(secret[1])):
        text = text.replace(value, "***")
    return text


def _secrets() -> list[tuple[str, str]]:
    """Name and value of each variable that holds a secret."""
    return [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and is_secret(name)
    ]


def check_no_secrets(tree: Any, at: Callable[[str], str]) -> None:
    """Check that no text of a tree reads or holds a variable that is named like a key.

    Args:
        tree: A config, as plain containers.
        at: The place of a dotted key, for the message.

    Raises:
        UserError: One does. The message names the variable, not its value.
    """
    secrets = _secrets()
    for key, text in texts(tree):
        for name in _READS_ENVIRONMENT.findall(text):
            if is_secret(name):
                raise UserError(f"{at(key)}: reads ${name}, {_WHY}")
        for name, value in secrets:
            if value in text:
                raise UserError(f"{at(key)}: holds the value of ${name}, {_WHY}")


_WHY = (
    "which looks like a secret and would be written into the run's folder; leave it out: what "
    "needs it reads the environment itself"
)
