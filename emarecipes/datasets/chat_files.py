"""Checks of chat data, with the place of what is wrong."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from emarecipes.config import Origin
from emarecipes.datasets.json_files import Place, json_rows
from emarecipes.datasets.row_keys import check_row_keys, is_trained, system_of
from emarecipes.errors import UserError

# By style: the keys of role and text, and the names of system, user, assistant.
STYLES = {
    "openai": ("role", "content", ("system", "user", "assistant", "ipython")),
    "sharegpt": ("from", "value", ("system", "human", "gpt")),
}
_LOCAL_SOURCES = ("json", "csv", "text", "parquet", "arrow")


class Turn(NamedTuple):
    """One message.

    Attributes:
        role: system, user, assistant or ipython.
        content: Its text.
        trained: Whether the row says that it is trained on; None: it does not say.
    """

    role: str
    content: str
    trained: bool | None = None


def check_data_files(cfg: DictConfig, origin: Origin) -> list[Path]:
    """Check that every local file below `cfg.dataset` exists. Rows are checked as they are read.

    Returns:
        The local data files, in the order of the config.

    Raises:
        UserError: A missing or empty file; a source that is not supported.
    """
    files: list[Path] = []
    for key, node in _dataset_nodes(cfg.dataset, "dataset"):
        if node.get("streaming"):
            raise UserError(
                f"{origin.at(f'{key}.streaming')}: every row is checked before training, which a "
                "stream does not allow; leave the key out"
            )
        if node.get("source") == "pandas" or node.get("trust_remote_code"):
            raise UserError(
                f"{origin.at(key)}: pickles and scripts of a data set are programs, and are not "
                f"run; name a source of {', '.join(_LOCAL_SOURCES)}, or one without a script"
            )
        if node.get("source") not in _LOCAL_SOURCES or node.get("data_files") is None:
            continue
        where = origin.at(f"{key}.data_files")
        for path in [path for name in _file_names(node) for path in _local_files(name, where)]:
            if path.stat().st_size == 0:
                raise UserError(f"{where}: the file is empty: {path}")
            files.append(path)
    return files


def check_chat_file(path: Path, column: str, style: str) -> None:
    """Check every row of a chat file, see `checked_chat_rows`."""
    if style not in STYLES:
        return  # torchtune names the styles it knows.
    for _ in checked_chat_rows(path, column, style):
        pass


def checked_chat_rows(path: Path, column: str, style: str) -> Iterator[tuple[Place, Any]]:
    """Place and row of a chat file.

    Args:
        path: The file, see `json_rows`.
        column: Key of the conversation in a row.
        style: "openai" (role, content) or "sharegpt" (from, value).

    Raises:
        UserError: With the place of the first row that is wrong.
    """
    for place, row in chat_rows(path, column, style):
        if isinstance(row, UserError):
            raise row
        yield place, row


def chat_rows(path: Path, column: str, style: str) -> Iterator[tuple[Place, Any]]:
    """Place and row of a chat file, see `json_rows`; for a row that is wrong, its error instead.

    Raises:
        UserError: The file cannot be read, or has no rows.
    """
    for place, row in json_rows(path):
        if isinstance(row, UserError):
            yield place, row
            continue
        try:
            read_conversation(row, column, style)
        except UserError as error:
            yield place, UserError(f"{place}: {error}")
        else:
            yield place, row


def read_conversation(row: Any, column: str, style: str) -> list[Turn]:
    """Check one row, and read it; its own `system` comes first.

    Raises:
        UserError: What is wrong, without the row's place.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get(column), list):
        raise UserError(f'a row needs a list of messages under "{column}"')
    check_row_keys(row, (column, "system"))
    role_key, text_key, roles = STYLES[style]
    names = dict(zip(roles, STYLES["openai"][2], strict=False))
    turns = []
    for position, message in enumerate(row[column]):
        at = f"message {position}"
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise UserError(f'{at}: a message is {{"{role_key}": ..., "{text_key}": ...}}')
        role = message[role_key]
        if role not in roles:
            raise UserError(f"{at}: unknown role {role!r}; roles are {', '.join(roles)}")
        try:
            trained = is_trained(message, (role_key, text_key))
        except UserError as error:
            raise UserError(f"{at}: {error}") from None
        if not _is_text(message[text_key]):
            raise UserError(f"{at}: {text_key} must be text, not {message[text_key]!r:.60}")
        turns.append(Turn(names[role], _text(message[text_key]), trained))
    if not any(turn.role == "assistant" for turn in turns):
        assistant = roles[2]
        raise UserError(f"the conversation has no {assistant} message to learn from")
    system = system_of(row)
    if system is not None and turns[0].role != "system":
        turns.insert(0, Turn("system", system, None))
    if system is not None and turns[0].content != system:
        raise UserError("the row's system and its system message differ; which one is meant?")
    return turns


def _is_text(content: Any) -> bool:
    """A string, or OpenAI's list of text parts; anything else would be dropped silently."""
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _file_names(node: Any) -> list[str]:
    names = node.get("data_files")
    if OmegaConf.is_config(names):
        names = OmegaConf.to_container(names)
    if isinstance(names, dict):  # By split.
        values = list(names.values())
        names = [n for value in values for n in (value if isinstance(value, list) else [value])]
    if names is None:
        return []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def _local_files(name: str, where: str) -> list[Path]:
    """The file of that name, or the files of a pattern; none for a URL."""
    if "://" in name:
        return []
    try:
        if Path(name).is_file():
            if glob.has_magic(name):
                # `datasets` would look for, say, rows1.jsonl.
                raise UserError(
                    f"{where}: {name} is a file, but *, ? and [ in a name are read as a pattern; "
                    "rename it"
                )
            return [Path(name)]
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []  # noqa: PTH207
    except OSError as error:  # Too long a name, for one.
        raise UserError(f"{where}: {error.strerror}: {name}") from None
    paths = [Path(path) for path in found if Path(path).is_file()]
    if not paths:
        raise UserError(f"{where}: no such file: {name}")
    return paths


def _dataset_nodes(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield key, node
        for name, value in node.items():
            yield from _dataset_nodes(value, f"{key}.{name!s}")
    elif OmegaConf.is_list(node):
        for index, value in enumerate(node):
            yield from _dataset_nodes(value, f"{key}.{index}")
