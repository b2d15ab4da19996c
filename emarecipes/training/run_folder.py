"""What a run writes besides weights: its config, and one line of metrics a logged step."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import emarecipes
from emarecipes.config import Origin, home
from emarecipes.datasets.rows import Rows, file_fingerprints
from emarecipes.errors import UserError

_RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "adapter",
    "merged",
    "checkpoints",
    "logs",
    "safelora.csv",
)
_VERSIONED = ("torch", "torchtune", "torchao", "datasets", "omegaconf", "tokenizers", "safetensors")


def check_output_dir(cfg: DictConfig, origin: Origin) -> None:
    """Check that the output folder can be written and holds no run, unless it may be overwritten.

    Raises:
        UserError: It holds a run, is not a folder, or cannot be written.
    """
    folder = Path(cfg.output_dir)
    where = origin.at("output_dir")
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
    base = Path(str(cfg.checkpointer.get("checkpoint_dir"))).resolve()
    if folder.resolve().is_relative_to(base):
        raise UserError(f"{where}: {folder} lies in the base model's folder; choose another")
    present = [name for name in _RUN_FILES if (folder / name).exists()]
    if present and cfg.overwrite and not _holds_a_run(folder):
        raise UserError(
            f"{where}: {folder} has {', '.join(present)} but no config.yaml of a run; not "
            "overwritten. Choose another output_dir"
        )
    if present and not cfg.overwrite:
        raise UserError(
            f"{where}: {folder} already holds a run; choose another output_dir, or say "
            "overwrite=true to replace it"
        )


def _holds_a_run(folder: Path) -> bool:
    config = folder / "config.yaml"
    return config.is_file() and "\nprovenance:" in config.read_text(encoding="utf-8")


class RunFolder:
    """A run's output folder, written by the first process.

    Args:
        cfg: The resolved config; its `output_dir` is created; an older run in it is set aside.
        rows: The data, for its fingerprint.
        data_files: Local files it was read from.
        world_size: Number of processes.
    """

    def __init__(
        self, cfg: DictConfig, rows: Rows, data_files: Iterable[Path], world_size: int
    ) -> None:
        self.path = Path(cfg.output_dir)
        self.path.mkdir(parents=True, exist_ok=True)
        self._replaced = self.path / ".replaced"
        self._set_aside()
        provenance = provenance_of(rows, list(data_files), world_size)
        resolved = OmegaConf.to_yaml(OmegaConf.merge(cfg, {"provenance": provenance}))
        write_text(self.path / "config.yaml", resolved)
        self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")

    def _set_aside(self) -> None:
        """Keep an older run until this one has saved an adapter."""
        old = [self.path / name for name in _RUN_FILES if (self.path / name).exists()]
        keep = not self._replaced.exists()  # Else what is here is of a run that never saved.
        for path in old:
            if keep:
                self._replaced.mkdir(exist_ok=True)
                path.rename(self._replaced / path.name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def discard_replaced(self) -> None:
        """Delete the run that was replaced: this one has an adapter now."""
        shutil.rmtree(self._replaced, ignore_errors=True)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._metrics.write(json.dumps(dict(metrics)) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        self._metrics.close()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """What produced a result: versions, commit and command line."""
    return {
        "emarecipes": emarecipes.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _VERSIONED},
        "arguments": sys.argv[1:],
    }


def provenance_of(rows: Rows, data_files: list[Path], world_size: int) -> dict[str, Any]:
    """`environment`, with fingerprints of the data and how many rows they gave."""
    return {
        **environment(),
        "processes": world_size,
        "data_files": file_fingerprints(data_files),
        "rows": len(rows),
        "rows_safe": rows.num_safe,
        "rows_without_label_dropped": rows.dropped,
        "rows_fingerprint": rows.fingerprint,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the clone that runs, with `+changes` if files differ from it."""
    if not (home() / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(home()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
