"""What a run writes besides weights: its config, and one line of metrics a logged step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from emarecipes.datasets.rows import Rows, provenance_of
from emarecipes.files import write_text
from emarecipes.output_dir import run_files
from emarecipes.training.checkpoint import Checkpoint


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
