"""Get a published data set: ``python -m emarecipes.datasets.fetch NAME --output DIR``.

The file is downloaded from the address it is pinned to, or taken with ``--from``, checked, and
written in our chat format.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from emarecipes.config import suggestion
from emarecipes.datasets._downloads import (
    check_first_seen,
    download_published,
    record_path,
    remember,
    was_seen,
)
from emarecipes.datasets._published_forms import FORMS, Converted
from emarecipes.datasets.published import PUBLISHED, Published
from emarecipes.errors import UserError
from emarecipes.files import json_lines, sync, write_json, write_text
from emarecipes.fingerprint import sha256

_MANIFEST = "fetched.json"


@dataclass(frozen=True)
class Fetched:
    """What a folder holds: its files with their rows, and lines on what to mind."""

    folder: Path
    files: dict[str, int]
    notes: list[str]
    was_there: bool


def fetch(
    name: str, output: str | Path, source: str | Path | None = None, *, trust_first: bool = False
) -> Fetched:
    """Write the published data set ``name`` into a folder, unless it is already there.

    The folder appears whole or not at all. It holds the data, ``fetched.json`` (origin, revision,
    licence, checksums) and a ``.gitignore``, so that published text is not committed by accident.

    Args:
        name: a key of ``PUBLISHED``.
        output: the folder, of this data set alone.
        source: the published file, if it is already here.
        trust_first: download a file of which no checksum is known, and record its own.

    Raises:
        UserError: unknown name; a folder with something else; no network, with the address to fetch
            by hand; a gated or encrypted set without ``source``; a download that no checksum
            would tell from another, without ``trust_first``; another file, form or row count than
            the published one.
    """
    if name not in PUBLISHED:
        hint = suggestion(name, PUBLISHED)
        raise UserError(f"unknown data set {name!r}{hint}; known: {', '.join(PUBLISHED)}")
    entry, target = PUBLISHED[name], Path(output).resolve()
    manifest = _manifest(target, name, entry)
    if manifest is None:
        file = Path(source) if source else None
        if file is None and not trust_first:
            _check_checksum_is_known(name, entry)
        manifest = _write(name, entry, target, file)
        return _fetched(entry, target, manifest, was_there=False)
    return _fetched(entry, target, manifest, was_there=True)


def _fetched(entry: Published, target: Path, manifest: dict[str, Any], was_there: bool) -> Fetched:
    notes = [f"source: {entry.paper}, {manifest['source_rows']} rows; licence: {entry.licence}"]
    notes += [
        f"left out: {count} rows {why}" for why, count in manifest["dropped"].items() if count
    ]
    if entry.rows is not None and manifest["source_rows"] != entry.rows:
        notes.append(f"about {entry.rows} rows were expected; that number is unconfirmed")
    if entry.unconfirmed:
        notes.append(f"unconfirmed: {', '.join(entry.unconfirmed)}")
    if entry.sha256 is None:
        notes.append(
            "no SHA-256 of it is known to us, so nothing tells whether this is the published file; "
            f"this one's, {manifest['source_sha256']}, is in {record_path()}, and every later "
            "fetch must give the same"
        )
    if entry.note:
        notes.append(entry.note)
    files = {file: known["rows"] for file, known in manifest["files"].items()}
    return Fetched(target, files, notes, was_there)


def _manifest(target: Path, name: str, entry: Published) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if the folder is still to be written."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        manifest: dict[str, Any] = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
        ours = (manifest["name"], manifest["revision"]) == (name, entry.revision)
        digests = {file: known["sha256"] for file, known in manifest["files"].items()}
        complete = {"source_rows", "dropped"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours, complete, digests = False, False, {}
    if not ours or not complete:
        raise UserError(
            f"{target} exists and was not written by this command for {name}; "
            "choose another --output"
        )
    for file, digest in digests.items():
        if not (target / file).is_file() or sha256(target / file) != digest:
            raise UserError(
                f"{target}: {file} is missing or was changed since it was fetched; "
                "delete the folder to fetch it again, or choose another --output"
            )
    return manifest


def _check_checksum_is_known(name: str, entry: Published) -> None:
    if not entry.by_hand and entry.sha256 is None and not was_seen(_first_seen_key(name, entry)):
        raise UserError(
            f"{name}: no SHA-256 of {entry.url} is known to us, so a download cannot be checked. "
            "Pass --trust-first to take what comes (its SHA-256 is recorded, and later fetches "
            "must give the same), or the file itself with --from FILE"
        )


def _first_seen_key(name: str, entry: Published) -> str:
    return f"{name}@{entry.revision}"


def _write(name: str, entry: Published, target: Path, source: Path | None) -> dict[str, Any]:
    if source is None and entry.by_hand:
        raise UserError(f"{name}: {entry.by_hand}")
    if source is not None and not source.is_file():
        raise UserError(f"{source}: no such file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            file = source or download_published(name, entry, staging)
            _check_file(name, entry, file)
            if entry.sha256 is None:
                check_first_seen(_first_seen_key(name, entry), sha256(file))
            converted = FORMS[entry.form](file, name)
            _check_rows(name, entry, file, converted.source_rows)
            folder = staging / "folder"
            folder.mkdir()
            manifest = _fill(folder, name, entry, file, converted)
            folder.replace(target)
            if entry.sha256 is None:
                remember(_first_seen_key(name, entry), manifest["source_sha256"])
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from None
    return manifest


def _check_file(name: str, entry: Published, file: Path) -> None:
    if entry.sha256 is None or (found := sha256(file)) == entry.sha256:
        return
    with file.open("rb") as start:
        pointer = start.read(40).startswith(b"version https://git-lfs")
    hint = " (a Git LFS pointer: download it with git lfs)" if pointer else ""
    raise UserError(
        f"{file} is not the published file of {name}{hint}: its SHA-256 is {found}, "
        f"expected {entry.sha256}; it is at {entry.url}"
    )


def _check_rows(name: str, entry: Published, file: Path, found: int) -> None:
    if entry.rows is not None and found != entry.rows and "rows" not in entry.unconfirmed:
        raise UserError(f"{file}: {found} rows, but {name} was published with {entry.rows}")


def _fill(
    folder: Path, name: str, entry: Published, file: Path, converted: Converted
) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = {}
    for file_name, rows in converted.files.items():
        if isinstance(rows, bytes):
            content, count = rows, converted.source_rows
        else:
            content, count = json_lines(rows, ensure_ascii=True).encode(), len(rows)
        (folder / file_name).write_bytes(content)
        sync(folder / file_name)
        digest = sha256(folder / file_name)
        files[file_name] = {"rows": count, "bytes": len(content), "sha256": digest}
    manifest = {
        "name": name,
        "paper": entry.paper,
        "url": entry.url,
        "revision": entry.revision,
        "licence": entry.licence,
        "unconfirmed": list(entry.unconfirmed),
        "source_sha256": sha256(file),
        "source_rows": converted.source_rows,
        "dropped": converted.dropped,
        "files": files,
    }
    write_text(folder / ".gitignore", "*\n")
    write_json(folder / _MANIFEST, manifest)
    return manifest


def _table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("name", "published by", "rows", "MB", "licence", "how"):
        table.add_column(header, justify="right" if header in ("rows", "MB") else "left")
    for name, entry in PUBLISHED.items():
        size = None if entry.size is None else f"{entry.size / 1e6:.3g}"
        cells = {"rows": entry.rows, "size": size, "licence": entry.licence}
        known = [
            "-" if cell is None else f"{cell}{' ?' if field in entry.unconfirmed else ''}"
            for field, cell in cells.items()
        ]
        table.add_row(name, entry.paper, *known, "by hand" if entry.by_hand else "download")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code (0; 1 after one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m emarecipes.datasets.fetch",
        description="Write a published data set in our chat format.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="none: list the data sets")
    parser.add_argument("--output", metavar="DIR", help="folder to write")
    parser.add_argument("--from", dest="source", metavar="FILE", help="the published file")
    parser.add_argument(
        "--trust-first",
        action="store_true",
        help="download a file of which no checksum is known, and hold later ones to its own",
    )
    args = parser.parse_args(arguments)
    if args.name is None:
        Console(width=None if sys.stdout.isatty() else 200).print(_table())
        print("?: unconfirmed, -: unknown, see docs/data.md")
        return 0
    try:
        if args.output is None:
            raise UserError(
                f"where to? python -m emarecipes.datasets.fetch {args.name} --output DIR"
            )
        found = fetch(args.name, args.output, args.source, trust_first=args.trust_first)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    for file, rows in found.files.items():
        print(f"{'already there' if found.was_there else 'wrote'}: {found.folder / file} ({rows})")
    for note in found.notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
