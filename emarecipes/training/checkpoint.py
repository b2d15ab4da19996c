"""Checkpoints on disk: each is whole or not there, and is checked before it is read.

    <output_dir>/checkpoints/step_N/
      adapter.safetensors   the adapter's whole tensors, in torchtune's names
      training.pt           optimizer, scheduler, defenses, every process's random states
      run.json              step, counters, config, the rows' fingerprint
      SHA256SUMS            of the other files, as `sha256sum --check` reads it

`training.pt` is read with `torch.load(weights_only=True)`: no file here can run code.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune import utils

from emarecipes.errors import UserError, reason
from emarecipes.files import open_to_others, sync
from emarecipes.fingerprint import sha256

log = utils.get_logger("INFO")

FORMAT = 1
_ADAPTER, _TRAINING, _RUN = "adapter.safetensors", "training.pt", "run.json"
_SUMS = "SHA256SUMS"
# Beside the tensors: JSON, headers, the file system's own blocks.
_MARGIN_BYTES = 2**20


@dataclass
class Counters:
    """What a run counts.

    Attributes:
        step: Steps done.
        tokens: Tokens seen, without padding.
        seconds: Time trained.
        skipped: Steps left out because a number was not finite.
        first: Each figure when it was first logged.
        last: Each figure when it was last logged.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums hold.

    Attributes:
        path: Its folder.
        run: What `run.json` holds.
    """

    path: Path
    run: dict[str, Any]

    @property
    def counters(self) -> Counters:
        """The run's counters at that step, a new object each time."""
        return Counters(**self.run["counters"])

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's whole tensors on the CPU."""
        return load_file(self.path / _ADAPTER)

    def training(self) -> dict[str, Any]:
        """What `training.pt` holds, on the CPU."""
        stored: dict[str, Any] = torch.load(
            self.path / _TRAINING, map_location="cpu", weights_only=True
        )
        return stored


def write_checkpoint(
    folder: Path,
    adapter: dict[str, Tensor],
    training: dict[str, Any],
    run: dict[str, Any],
    counters: Counters,
) -> Path:
    """Write `folder/step_N`. It appears under that name when all of it is on disk, or not at all.

    Args:
        folder: The run's `checkpoints`.
        adapter: The adapter's whole tensors on the CPU.
        training: Tensors, numbers, strings and containers of these.
        run: More for `run.json`.
        counters: The run's; N is its step.

    Raises:
        UserError: No room, a write that fails, or a value that could not be read back.
    """
    target = folder / f"step_{counters.step}"
    temporary = folder / f".step_{counters.step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".step_*.partial"):
            shutil.rmtree(left_over)
        _check_room(folder, _tensor_bytes(adapter) + _tensor_bytes(training) + _MARGIN_BYTES)
        temporary.mkdir()
        save_file(adapter, temporary / _ADAPTER)
        open_to_others(temporary / _ADAPTER)
        torch.save(training, temporary / _TRAINING)
        # Reads no tensor: fails on what only a full unpickling, which is unsafe, would give back.
        torch.load(temporary / _TRAINING, map_location="meta", weights_only=True)
        described = {"format": FORMAT, **run, "counters": asdict(counters)}
        (temporary / _RUN).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (temporary / _SUMS).write_text(_sums(temporary), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():  # A damaged one that this run was not resumed from.
            shutil.rmtree(target)
        temporary.rename(target)
        sync(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint of step {counters.step} not written: {reason(error)}"
        ) from error
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its checksum, and read `run.json`.

    Raises:
        UserError: A file is missing, was changed, or is one too many; another format.
    """
    try:
        stored = (path / _SUMS).read_bytes().decode(errors="replace")
        found = _sums(path)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    if stored != found:
        changed = sorted(set(stored.splitlines()) ^ set(found.splitlines()))
        names = {line.split("  ", 1)[-1] for line in changed} & {_ADAPTER, _TRAINING, _RUN}
        raise UserError(f"{path}: does not match its checksums ({', '.join(names) or _SUMS})")
    run: dict[str, Any] = json.loads((path / _RUN).read_text(encoding="utf-8"))
    if run["format"] != FORMAT:
        raise UserError(f"{path}: written in format {run['format']}, this version reads {FORMAT}")
    return Checkpoint(path, run)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in a run's `checkpoints`; damaged ones are named and passed by.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    steps = checkpoint_steps(folder)
    for step in reversed(steps):
        try:
            return read_checkpoint(folder / f"step_{step}")
        except UserError as error:
            log.warning(f"DAMAGED CHECKPOINT, trying the one before: {error}")
    if steps:
        raise UserError(f"none of the {len(steps)} checkpoint(s) in {folder} is whole")
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of which a run's `checkpoints` holds one, in order."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def delete_checkpoints(folder: Path, steps: list[int]) -> None:
    """Delete checkpoints. One that is half deleted no longer matches its checksums."""
    for step in steps:
        shutil.rmtree(folder / f"step_{step}")


def _sums(folder: Path) -> str:
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != _SUMS:
            lines.append(f"{sha256(path)}  {path.name}\n")
    return "".join(lines)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"it needs {needed / 2**20:,.0f} MiB, and {folder} has {free / 2**20:,.0f} MiB free; "
            "make room, or lower keep_last"
        )


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0
