"""Downloads of published files, and trust on first use where no checksum is known to this project.

The SHA-256 of the first one that was fetched is kept for the user, as SSH keeps a host's key; every
later fetch of the same revision, into whichever folder, must give the same.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from emarecipes.datasets.published import Published
from emarecipes.errors import UserError, reason
from emarecipes.files import write_json

_CHUNK_BYTES = 2**20
_TIMEOUT_SECONDS = 30
_MAX_BYTES = 2**31  # No published set is near.


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


def download_published(name: str, entry: Published, work: Path) -> Path:
    """Download a published file into a folder.

    From Hugging Face's hub by its own library: with its retries, and going on where a connection
    broke. `HF_ENDPOINT` names a mirror of it.

    Raises:
        UserError: It cannot be had, with the address to fetch by hand.
    """
    try:
        return _from_hub(entry, work) if entry.hub else _from_address(name, entry, work)
    except urllib.error.HTTPError as error:
        why = f"HTTP {error.code} {error.reason}"
    except Exception as error:  # Of urllib, or of the hub's HTTP library, which changes by version.
        why = str(getattr(error, "reason", None) or reason(error))
    raise UserError(
        f"{name}: no download ({why}); fetch {entry.url} by hand and pass it with --from FILE"
    )


def _from_hub(entry: Published, work: Path) -> Path:
    assert entry.hub is not None
    repository, file = entry.hub
    found = hf_hub_download(
        repository,
        file,
        repo_type="dataset",
        revision=entry.revision,
        local_dir=work,
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    return Path(found)


def _from_address(name: str, entry: Published, work: Path) -> Path:
    file = work / entry.url.rpartition("/")[2]
    request = urllib.request.Request(entry.url, headers={"User-Agent": "emarecipes"})
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
        file.open("wb") as out,
        tqdm(
            desc=f"downloading {name}",
            total=(length := _length(response)) or entry.size,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar,
    ):
        while chunk := response.read(_CHUNK_BYTES):
            out.write(chunk)
            bar.update(len(chunk))
            if out.tell() > _MAX_BYTES:
                raise ConnectionError(f"more than {_MAX_BYTES} bytes came")
        # A connection that ends early looks like the end of the file.
        if length is not None and out.tell() != length:
            raise ConnectionError(f"it ended after {out.tell()} of {length} bytes")
    return file


def _length(response: Any) -> int | None:
    stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdecimal() else None
