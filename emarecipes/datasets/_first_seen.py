"""Trust on first use, for published files of which no checksum is known to this project.

The SHA-256 of the first one that was fetched is kept for the user, as SSH keeps a host's key; every
later fetch of the same revision, into whichever folder, must give the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from filelock import FileLock

from emarecipes.errors import UserError
from emarecipes.files import write_json


def record_path() -> Path:
    """`first_seen.json` in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "emarecipes/first_seen.json"


def check_first_seen(key: str, digest: str) -> None:
    """Check a file's SHA-256 against the one that was fetched first, if there was one.

    Raises:
        UserError: It is another, or the record cannot be read.
    """
    known = _read().get(key, digest)
    if known != digest:
        raise UserError(
            f"{key}: its SHA-256 is {digest}, that of the file fetched first was {known} "
            f"(recorded in {record_path()}): one of them is not the published file. Compare both, "
            "and delete that line only if you trust the new one"
        )


def was_seen(key: str) -> bool:
    """Whether a file was fetched before, so that the next one can be checked."""
    return key in _read()


def remember(key: str, digest: str) -> None:
    """Record a file that has been written, unless one was before."""
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # Else one of two fetches at once would be lost.
        record = _read()
        if key not in record:
            write_json(path, record | {key: digest})


def _read() -> dict[str, str]:
    path = record_path()
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(record, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: not a record of checksums; mend or delete it") from None
    return record
