"""Files that are whole or not there, and lines of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
