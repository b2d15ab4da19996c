"""Checks of chat data in JSONL files, with the line of what is wrong.

torchtune reads them through Hugging Face `datasets`, whose errors name neither file nor line.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.config import Origin
from emarecipes.errors import UserError

# By style: the keys of role and text, and the names of system, user, assistant.
STYLES = {
    "openai": ("role", "content", ("system", "user", "assistant", "ipython")),
    "sharegpt": ("from", "value", ("system", "human", "gpt")),
}
_LOCAL_SOURCES = ("json", "csv", "text", "parquet", "arrow")


def check_data_files(cfg: DictConfig, origin: Origin) -> list[Path]:
    """Check that every local file below `cfg.dataset` exists, and the rows of chat files.

    Returns:
        The local data files, in the order of the config.

    Raises:
        UserError: A missing or empty file; in a chat file, a line that is not JSON, a row without
            the conversation column, a message without role or text, a wrong role, no assistant
            message.
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
            if path.suffix == ".jsonl" and node.get("conversation_column"):
                check_chat_file(
                    path,
                    str(node.conversation_column),
                    str(node.get("conversation_style", "openai")),
                )
            files.append(path)
    return files


def check_chat_file(path: Path, column: str, style: str) -> None:
    """Check every row of a JSONL chat file.

    Args:
        path: The file.
        column: Key of the conversation in a row.
        style: "openai" (role, content) or "sharegpt" (from, value).

    Raises:
        UserError: With `file:line` of the first row that is wrong.
    """
    if style not in STYLES:
        return  # torchtune names the styles it knows.
    for _, row in chat_rows(path, column, style):
        if isinstance(row, UserError):
            raise row


def chat_rows(path: Path, column: str, style: str) -> Iterator[tuple[int, Any]]:
    """Line number and row of a JSONL chat file; for a row that is wrong, its error instead.

    Raises:
        UserError: The file has no rows, or is not text.
    """
    kinds: dict[str, tuple[str, int]] = {}
    number = 0
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            row = read_row(line, where)
            if not isinstance(row, dict) or not isinstance(row.get(column), list):
                raise UserError(f'{where}: a row needs a list of messages under "{column}"')
            _check_conversation(row[column], where, style)
            _check_kinds(row, "", number, kinds, where)
        except UserError as error:
            yield number, error
        else:
            yield number, row
    if number == 0:
        raise UserError(f"{path}: the file has no rows")


def read_row(line: str, where: str) -> Any:
    """One line of a JSONL file. Only what every reader of JSON takes in the same way is accepted.

    Raises:
        UserError: Not JSON, a key twice in an object, a number that JSON does not have, half of a
            surrogate pair, nesting that is too deep.
    """
    try:
        row = json.loads(line, object_pairs_hook=_object, parse_constant=_no_number)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(
            f"{where}: contains half of a surrogate pair ({half!a}), which is not a character"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: cannot be read: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read: {str(error).splitlines()[0]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" is there twice')
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _check_kinds(
    value: Any, key: str, number: int, kinds: dict[str, tuple[str, int]], where: str
) -> None:
    """Check that a key holds the same kind of value in every row, as Arrow's tables need it."""
    if value is None:
        return
    kind = next(name for name, types in _KINDS.items() if isinstance(value, types))
    first, line = kinds.setdefault(key, (kind, number))
    if first != kind:
        raise UserError(
            f"{where}: {key} is {kind}, and in line {line} {first}: it must be the same in all rows"
        )
    if kind == "a number" and abs(value) >= 2**63:
        raise UserError(f"{where}: {key} is {value:.3g}, too large a number")
    if isinstance(value, dict):
        for name, child in value.items():
            _check_kinds(child, f"{key}.{name}" if key else name, number, kinds, where)
    elif isinstance(value, list):
        for child in value:
            _check_kinds(child, f"{key}[]", number, kinds, where)


_KINDS: dict[str, Any] = {
    "true or false": bool,
    "a number": (int, float),
    "text": str,
    "a list": list,
    "an object": dict,
}


def row_place(cfg: DictConfig, key: str, index: int, origin: Origin) -> str:
    """Where row `index` of the data set at `key` was written: `file:line` if that can be told."""
    node = OmegaConf.select(cfg, key)
    names = _file_names(node)
    plain = (
        not node.get("packed")
        and node.get("filter_fn") is None
        and node.get("split", "train") == "train"
    )
    if plain and len(names) == 1 and names[0].endswith(".jsonl") and Path(names[0]).is_file():
        for row, (number, _) in enumerate(_lines(Path(names[0]))):
            if row == index:
                return f"{names[0]}:{number}"
    return f"{origin.at(key)}: row {index}"


def _check_conversation(messages: list[Any], where: str, style: str) -> None:
    role_key, text_key, roles = STYLES[style]
    for position, message in enumerate(messages):
        at = f"{where}: message {position}"
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise UserError(f'{at}: a message is {{"{role_key}": ..., "{text_key}": ...}}')
        if message[role_key] not in roles:
            raise UserError(
                f"{at}: unknown role {message[role_key]!r}; roles are {', '.join(roles)}"
            )
        if not _is_text(message[text_key]):
            raise UserError(f"{at}: {text_key} must be text, not {message[text_key]!r:.60}")
        if message.get("weight", 1) != 1:
            raise UserError(f"{at}: a weight of its own is not supported")
    assistant = "assistant" if style == "openai" else "gpt"
    if not any(message[role_key] == assistant for message in messages):
        raise UserError(f"{where}: the conversation has no {assistant} message to learn from")


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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line that is not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


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
