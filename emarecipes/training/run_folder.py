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
from emarecipes.files import write_text
from emarecipes.training.checkpoint import FOLDER as CHECKPOINTS
from emarecipes.training.checkpoint import Checkpoint

_RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "adapter",
    "merged",
    CHECKPOINTS,
    "logs",
    "safelora.csv",
)
_VERSIONED = ("torch", "torchtune", "torchao", "datasets", "omegaconf", "tokenizers", "safetensors")


def run_files(folder: Path) -> list[str]:
    """Which of a run's files and folders this one has."""
    return [name for name in _RUN_FILES if (folder / name).exists()]


def check_output_dir(cfg: DictConfig, origin: Origin) -> None:
    """Check that the output folder can be written and holds no run, unless it may be overwritten.

    Whether a run in it can be resumed is for `find_checkpoint` to say.

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
    present = run_files(folder)
    resumes = cfg.get("resume") is not None
    if present and (cfg.overwrite or resumes) and not _holds_a_run(folder):
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


def _holds_a_run(folder: Path) -> bool:
    config = folder / "config.yaml"
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


class RunFolder:
    """A run's output folder, written by the first process.

    Args:
        cfg: The resolved config; its `output_dir` is created; an older run in it is set aside.
        rows: The data, for its fingerprint.
        data_files: Local files it was read from.
        world_size: Number of processes.
        resumed: What the run goes on from. `metrics.jsonl` then starts with that run's lines up to
            the checkpoint's step, and the checkpoint's own run is not set aside.
    """

    def __init__(
        self,
        cfg: DictConfig,
        rows: Rows,
        data_files: Iterable[Path],
        world_size: int,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.path = Path(cfg.output_dir)
        self.path.mkdir(parents=True, exist_ok=True)
        self._replaced = self.path / ".replaced"
        provenance = provenance_of(rows, list(data_files), world_size)
        done = ""
        if resumed is not None:
            step = resumed.counters.step
            provenance |= {"resumed_from": str(resumed.path), "resumed_at_step": step}
            done = _lines_up_to(resumed.path.parent.parent / "metrics.jsonl", step)
        if resumed is None or resumed.path.resolve().parent.parent != self.path.resolve():
            self._set_aside()
        resolved = OmegaConf.to_yaml(OmegaConf.merge(cfg, {"provenance": provenance}))
        write_text(self.path / "config.yaml", resolved)
        write_text(self.path / "metrics.jsonl", done)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")

    def _set_aside(self) -> None:
        """Keep an older run until this one has saved an adapter."""
        old = [self.path / name for name in run_files(self.path)]
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

    def sync(self) -> None:
        """Wait until `metrics.jsonl` is on disk."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        self._metrics.close()


def _lines_up_to(metrics: Path, step: int) -> str:
    """The lines of a `metrics.jsonl` up to a step; the last one may have been cut off."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    return "".join(kept)


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
        "rows_cut": rows.cut,
        "rows_without_stop": rows.unended,
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
