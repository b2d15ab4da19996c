"""The exceptions that mean "the user can mend this"."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_LONGEST = 1200


class UserError(ValueError):
    """A mistake in a config, a data file, a checkpoint or the command line.

    The message is one line: where (file, line, key), what is wrong, what would be right. Commands
    print it without a traceback and exit with code 1. What is not printable in it (line breaks,
    escape sequences of a terminal) is shown escaped, and the middle of a huge one is left out, for
    messages quote what a user wrote.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class RowError(UserError):
    """A mistake in a data file. The message begins with its place: nothing is put before it."""


class UserCodeError(UserError):
    """An exception out of code that a config names, such as a user's own defense.

    Its author needs the traceback of the cause, which commands print above the line.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Extension:
    """What users subclass in files of their own; an error in such code is told with its place."""


def reason(error: BaseException) -> str:
    """What an exception says, in one line, and what it was raised from says: `what: cause`."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = first_line(cause)
        if not any(text in earlier for earlier in found):
            found.append(text.removesuffix("."))
        cause = cause.__cause__
    return ": ".join(found)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """While safetensors writes `path`: what the disk refuses is raised as the OSError that it is.

    safetensors only quotes its number in a text.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
