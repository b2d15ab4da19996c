"""Digests of what a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

# Enough of a weights file to tell it from another: its header and some values at either end.
_SAMPLED_BYTES = 2**20


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, and of files given as paths."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            found.update(part.read_bytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


def stored(path: Path, key: Literal["dtype", "date"]) -> str | None:
    """What a file of fingerprints holds in plain text, if it does.

    A run that goes on keeps it; a broken file is for whoever compares the fingerprints to tell.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found.get("fingerprint", found)[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def sampled_digest(paths: Iterable[Path]) -> str:
    """The same over names, sizes and both ends of large files."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            found.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            found.update(file.read(_SAMPLED_BYTES))
    return found.hexdigest()
