"""Whether a run may write into its output folder, and what of an older run is there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.config import Origin
from emarecipes.errors import UserError

CHECKPOINTS = "checkpoints"
# In a folder of answers: where processes that sample put theirs until all are there.
ANSWER_PARTS = ".parts"
_RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "adapter",
    "merged",
    CHECKPOINTS,
    "logs",
    "safelora.csv",
)


def run_files(folder: Path) -> list[str]:
    """Which of a run's files and folders this one has."""
    names = list(_RUN_FILES)
    config = folder / "config.yaml"
    if config.is_file() and any(folder.glob(further_adapter("*"))):
        # Of the run's defenses: any other such folder is the user's.
        run: Any = OmegaConf.load(config)
        names += [further_adapter(name) for name in run.get("defenses") or ()]
    return [name for name in names if (folder / name).exists()]


def is_replaced(folder: Path, path: Path) -> bool:
    """Whether a file or folder is one of a run's in this folder, or lies in one."""
    try:
        first = path.resolve().relative_to(folder.resolve()).parts[:1]
    except ValueError:
        return False
    return first == () or first[0] in _RUN_FILES or first[0].startswith(further_adapter(""))


def further_adapter(name: str) -> str:
    """The folder, beside `adapter`, of an adapter that a run's defense of this name saves."""
    return f"adapter_{name}"


def check_writable(folder: Path, where: str) -> None:
    """Check that a folder can be made and written, or is there and can be.

    Args:
        folder: With or without parents.
        where: The place in the config that names it.

    Raises:
        UserError: It is or lies below a file or a link to nothing, or must not be written.
    """
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            if existing.is_symlink():
                raise UserError(f"{where}: {existing} is a link to what is not there")
            existing = existing.parent
    except OSError as error:  # Too long a name, for one.
        raise UserError(f"{where}: {error.strerror}: {folder}") from None
    if not existing.is_dir():
        raise UserError(f"{where}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{where}: no permission to write in {existing}")


def claim(folder: Path, where: str) -> Callable[[], None]:
    """Make a folder, and have it for this process alone until it ends, or gives it back.

    A file system that has no locks has none of this.

    Args:
        folder: The output folder.
        where: The place in the config that names it.

    Returns:
        What gives it back.

    Raises:
        UserError: Another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}: {folder}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{where}: another process writes into {folder} now; choose another output_dir, or "
            "wait until it has ended"
        ) from None
    except OSError:
        pass
    return lambda: os.close(descriptor)


@contextmanager
def held(folder: Path, where: str) -> Iterator[None]:
    """`claim` for the body."""
    give_back = claim(folder, where)
    try:
        yield
    finally:
        give_back()


def check_output_dir(cfg: DictConfig, origin: Origin) -> None:
    """Check that the output folder holds no run, unless it may be overwritten.

    Whether a run in it can be resumed is for `find_checkpoint` to say.

    Raises:
        UserError: It holds a run, or lies in the base model's folder.
    """
    folder = Path(cfg.output_dir)
    where = origin.at("output_dir")
    base = Path(str(cfg.checkpointer.get("checkpoint_dir"))).resolve()
    if folder.resolve().is_relative_to(base):
        raise UserError(f"{where}: {folder} lies in the base model's folder; choose another")
    present = run_files(folder)
    resumes = cfg.get("resume") is not None
    if present and (cfg.overwrite or resumes) and not is_written(folder / "config.yaml"):
        raise UserError(
            f"{where}: {folder} has {', '.join(present)} but no config.yaml of a run; not "
            "overwritten. Choose another output_dir"
        )
    if present and not cfg.overwrite and not resumes:
        hint = "; to go on with it, say resume=auto" if CHECKPOINTS in present else ""
        raise UserError(
            f"{where}: {folder} already holds a run; choose another output_dir, or say "
            f"overwrite=true to replace it{hint}"
        )


def check_further(cfg: DictConfig, origin: Origin, names: Iterable[str]) -> None:
    """Check that what defenses of these names save replaces nothing but an older run's own.

    Raises:
        UserError: There is something else under such a name.
    """
    folder, where = Path(cfg.output_dir), origin.at("output_dir")
    known = run_files(folder)
    for name in map(further_adapter, names):
        if (folder / name).exists() and name not in known:
            raise UserError(
                f"{where}: {folder / name} is of no run there, and a defense of that name would "
                "replace it; move it, or choose another output_dir"
            )


def is_written(config: Path) -> bool:
    """Whether a config is one that a recipe wrote beside its results, and not a user's."""
    return config.is_file() and "\nprovenance:" in config.read_text(encoding="utf-8")


def check_outside_output(cfg: DictConfig, origin: Origin, inputs: Iterable[Path]) -> None:
    """Check that no file or folder that the run reads lies where `overwrite` would replace it.

    Raises:
        UserError: One lies in the run's own output folder.
    """
    output = Path(cfg.output_dir).resolve()
    for path in inputs:
        if path.resolve().is_relative_to(output):
            raise UserError(
                f"{origin.at('output_dir')}: the run reads {path}, which lies in its own output "
                "folder; choose another output_dir"
            )
