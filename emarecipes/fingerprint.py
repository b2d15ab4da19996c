"""Digests of what a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from emarecipes.config import find_input
from emarecipes.errors import UserError
from emarecipes.files import START_ANEW

# What is too large to be read at every start.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Of these: both ends, the header among them, and blocks in between, at most so many, so that no
# matrix lies between two. A model that was fine-tuned and merged differs from its base there alone.
_END_BYTES, _BLOCK_BYTES, _BLOCKS, _LEAST_DISTANCE = 2**20, 2**9, 2**12, 2**16
_READ_BYTES = 2**20
# Of a folder that a config names: models, adapters, data, templates.
_READ_OF_FOLDERS = (".safetensors", ".bin", ".json", ".jsonl", ".jinja")


def sha256(path: Path, read: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file's content in hexadecimal, as `sha256sum` gives it.

    Args:
        path: The file; it is read block by block.
        read: Told how many bytes each block has, for a progress bar.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            found.update(block)
            read(len(block))
    return found.hexdigest()


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, and of files given as paths."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            found.update(part.read_bytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


def adapter_content(folder: Path) -> str:
    """Of an adapter's files, as evaluations say what they are of."""
    return digest(*sorted(folder.glob("adapter_*")))


def adapter_digest(folder: Path | None) -> str:
    """Of an adapter's files, or of none, as sampled answers say what they are of."""
    return digest(folder is None, *([] if folder is None else sorted(folder.glob("adapter_*"))))


def stored(path: Path, key: Literal["dtype", "date"]) -> str | None:
    """What a file of fingerprints holds in plain text, if it does.

    A run that goes on keeps it; a broken file is for whoever compares the fingerprints to tell.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found.get("fingerprint", found)[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def differing(path: Path, fingerprint: Mapping[str, str], where: str, old: str = "") -> list[str]:
    """The names of what is other now than what a file of fingerprints holds.

    Args:
        path: The file: the fingerprint, or an object that has it as `fingerprint`.
        fingerprint: By name, as a digest each; `dtype` and `date` as they are.
        where: What messages begin with.
        old: A name that an older file lacks, and is taken at its word for.

    Raises:
        UserError: The file is broken.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("fingerprint", found)
        if old in fingerprint:
            found.setdefault(old, fingerprint[old])
        other = [name for name in fingerprint if found.get(name) != fingerprint[name]]
        return other + [name for name in found if name not in fingerprint]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{where}: {path} is broken; {START_ANEW}") from None


def named_files(node: Any, without: Path | None = None) -> list[Path]:
    """The files that the texts of a config name, and those of the folders that they name.

    Args:
        node: Of a config, as plain mappings and lists.
        without: A folder that is left out, with what is in it.
    """
    files: list[Path] = []
    for path in named_paths(node):
        if without is not None and without in (path, *path.parents):
            continue
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix in _READ_OF_FOLDERS)
    return files


def named_paths(node: Any) -> list[Path]:
    """The files and folders that the texts of a config name, as plain mappings and lists.

    Here, or else where the recipes find them, see `find_input`.
    """
    paths = (Path(find_input(value)) for value in _strings(node) if value and len(value) <= 255)
    return [path for path in paths if path.exists()]


def _strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in _strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in _strings(value)]
    return [node] if isinstance(node, str) else []


def sampled_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents; of weights files over sizes, both ends and blocks between.

    A weights file in which less than a 4096th changed, such as one row, may keep its digest.
    """
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name}:{size};".encode())
        if path.suffix not in _WEIGHTS or size <= 2 * _END_BYTES:
            found.update(path.read_bytes())
            continue
        with path.open("rb") as file:
            found.update(file.read(_END_BYTES))
            distance = max(_LEAST_DISTANCE, size // _BLOCKS)
            for start in range(_END_BYTES, size - _END_BYTES, distance):
                file.seek(start)
                found.update(file.read(_BLOCK_BYTES))
            file.seek(size - _END_BYTES)
            found.update(file.read(_END_BYTES))
    return found.hexdigest()
