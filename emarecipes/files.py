"""Files that are whole or not there, and lines of JSON.

Lines are also what a stopped run goes on from: `append_lines` while it works, `read_lines` when the
next one begins, which `emarecipes.fingerprint.differing` has told that they are of the same work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from emarecipes.errors import UserError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

START_ANEW = "choose another output_dir, or say overwrite=true to start anew"


@contextmanager
def whole(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Give a path to write, whose file takes `path`'s place once the body is done.

    If the body fails, `path` stays as it was and nothing is left beside it; a process that is
    killed leaves `.NAME.partial`, which the next one replaces. Two processes must not write one
    path at once.

    Args:
        path: The file; its folder must be there.
        synced: Whether its content is on disk before it takes its place. Without, a power cut may
            leave an empty file: for what nothing is read from later.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if synced:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_to_others(path: Path) -> None:
    """Give a file the mode of any new one: those of safetensors are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, *, indent: int | None = 2, ensure_ascii: bool = True
) -> None:
    """`write_text` of a JSON value and a line break."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def json_lines(rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = False) -> str:
    """A line of JSON a row."""
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)


def ended_lines(path: Path) -> list[bytes]:
    """A file's lines, but for what follows the last line break: a killed process was writing it.

    Lines end with a line break alone: JSON may hold the other characters at which
    `str.splitlines` splits.
    """
    return path.read_bytes().split(b"\n")[:-1]


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add a line of JSON a row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def read_lines(
    path: Path, parse: Callable[[Any], tuple[K, V]], what: str, where: str, again: str = START_ANEW
) -> dict[K, V]:
    """What a killed run has appended, but for the line that it was writing; of a key the last.

    Args:
        path: The file.
        parse: Key and value of a line's JSON; a ValueError, KeyError or TypeError says it is none.
        what: What a line is, for messages.
        where: What messages begin with.
        again: What a user can do about a broken file.

    Raises:
        UserError: A line is no such thing.
    """
    found = {}
    for number, line in enumerate(ended_lines(path), start=1):
        try:
            key, value = parse(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: {path}:{number} is no {what}; {again}") from None
        found[key] = value
    return found


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
