"""Rows of JSON files as they are written: JSON lines, or one list.

Hugging Face `datasets` puts them into tables: it guesses each column's type from the first 10 MB,
reads text that looks like a date as one, and fails where a later row does not fit. So they are read
here with Python's own JSON library, whatever the file is called.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emarecipes.errors import RowError, UserError, first_line


class Place(NamedTuple):
    """Where a row stands: a line, from 1, or in a list the row's index, from 0."""

    path: Path
    unit: Literal["line", "row"]
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}: {self.short}"

    @property
    def short(self) -> str:
        """Without the file: `line 3`."""
        return f"{self.unit} {self.number}"


def json_rows(
    path: Path, *, field: str | None = None, encoding: str = "utf-8"
) -> Iterator[tuple[Place, Any]]:
    """Every row and its place.

    A line that cannot be read has its error in place of the row, so that every one can be told.

    Args:
        path: A file of one row a line, or of one list of rows.
        field: Key of the list, where the file is one object that holds it.
        encoding: The file's.

    Raises:
        UserError: The file has no rows, is not text, is a Git LFS pointer, or is a list that cannot
            be read.
    """
    empty = True
    if field is not None or _is_list(path, encoding):
        for index, row in enumerate(_list(path, field, encoding)):
            empty = False
            yield Place(path, "row", index), row
    else:
        for number, line in lines(path, encoding):
            empty = False
            place = Place(path, "line", number)
            if number == 1 and line.startswith("version https://git-lfs"):
                raise RowError(f"{path}: a Git LFS pointer, not the file; download it with git lfs")
            try:
                yield place, read_row(line, str(place))
            except UserError as error:
                yield place, error
    if empty:
        raise RowError(f"{path}: the file has no rows")


def _is_list(path: Path, encoding: str) -> bool:
    return next((line.lstrip()[0] == "[" for _, line in lines(path, encoding)), False)


def _list(path: Path, field: str | None, encoding: str) -> list[Any]:
    try:
        found = read_row(path.read_text(encoding=encoding), str(path))
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from None
    if field is not None:
        if not isinstance(found, dict) or field not in found:
            raise RowError(f'{path}: no key "{field}" in it, which holds the rows')
        found = found[field]
    if not isinstance(found, list):
        raise RowError(f"{path}: a list of rows is expected")
    return found


def read_row(text: str, where: str) -> Any:
    """One value of JSON. Only what every reader of JSON takes in the same way is accepted.

    Raises:
        UserError: Not JSON, a key twice in an object, a number that JSON does not have, half of a
            surrogate pair, nesting that is too deep.
    """
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise RowError(f"{where}: not valid JSON: {error.msg} at {at}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RowError(
            f"{where}: contains half of a surrogate pair ({half!a}), which is not a character"
        ) from None
    except RecursionError:
        raise RowError(f"{where}: cannot be read: nested too deeply") from None
    except ValueError as error:
        raise RowError(f"{where}: cannot be read: {first_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" is there twice')
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line that is not blank."""
    try:
        with path.open(encoding=encoding) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from None


def _not_text(path: Path, error: UnicodeDecodeError) -> UserError:
    return RowError(
        f"{path}: not {error.encoding.upper()} text: {error.reason} at byte {error.start}"
    )
