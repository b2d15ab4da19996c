"""What a run writes besides weights: its config, a line of metrics a logged step, its summary."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torchtune.config import instantiate

from emarecipes.datasets.rows import Rows, provenance_of
from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.files import write_text
from emarecipes.output_dir import run_files
from emarecipes.training.checked import CheckedRun
from emarecipes.training.checkpoint import Checkpoint, Counters
from emarecipes.training.probe_stop import has_stopped
from emarecipes.training.step import TrainingLoss


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


def print_summary(
    loss: TrainingLoss,
    counters: Counters,
    dropped_rows: int,
    *,
    output_dir: Path,
    ended: str | None,
) -> None:
    """Print steps, tokens, time, and each term's first and last value, and where to look next.

    Args:
        loss: For the terms' names and weights.
        counters: The run's.
        dropped_rows: Rows without a label.
        output_dir: The run's folder.
        ended: Why it ended before its last step, if it did.
    """
    steps, first, last = counters.step, counters.first, counters.last
    plural = "s" if steps > 1 else ""
    table = Table(
        title=f"{steps} step{plural}, {counters.tokens:,} tokens, {counters.seconds:.0f} s"
    )
    table.add_column("term")
    for heading in ("weight", "first", "last"):
        table.add_column(heading, justify="right")
    if "loss" in first:  # Else every step was skipped.
        table.add_row("loss", "", f"{first['loss']:.4f}", f"{last['loss']:.4f}", style="bold")
    for name, weight in zip(loss.names, loss.weights, strict=True):
        if name in first:
            table.add_row(name, f"{weight:g}", f"{first[name]:.4f}", f"{last[name]:.4f}")
    console = Console()
    console.print(table)
    if ended is not None:
        console.print(f"{ended}.", highlight=False, soft_wrap=True)
    idle = [n for n, w in zip(loss.names, loss.weights, strict=True) if w and n not in first]
    if idle and "loss" in first:
        console.print(f"No step had rows for {', '.join(idle)}: without effect in this run.")
    if counters.skipped:
        console.print(f"{counters.skipped} steps were skipped: a number was not finite.")
    if dropped_rows:
        console.print(f"{dropped_rows} rows had no label left (max_seq_len) and were dropped.")
    console.print(f"Run folder:   {output_dir}", highlight=False, soft_wrap=True)
    console.print(
        f"TensorBoard:  tensorboard --logdir {output_dir}", highlight=False, soft_wrap=True
    )


class RunLog:
    """Counts steps on every process, and writes of them on the first.

    Args:
        run: The run; its folder is opened.
        counters: Updated by every step.
        world_size: Number of processes.
        first_process: Whether this one writes.
    """

    def __init__(
        self, run: CheckedRun, counters: Counters, world_size: int, *, first_process: bool
    ) -> None:
        self._run = run
        self._counters = counters
        self._folder: RunFolder | None = None
        self._logger = None
        if first_process:
            self._folder = RunFolder(run.cfg, run.rows, run.data_files, world_size, run.resumed)
            self._logger = instantiate(run.cfg.metric_logger)

    def step(self, epoch: int, figures: dict[str, float], *, always: bool = False) -> None:
        """Count a step that is done, and log it if it is one that is logged, or `always`."""
        counters = self._counters
        counters.step += 1
        counters.tokens += int(figures.pop("tokens"))
        counters.skipped += int(figures.get("skipped", 0))
        metrics = {"step": counters.step, "epoch": epoch, **figures}
        counters.first = metrics | counters.first
        counters.last |= metrics
        due = always or counters.step % self._run.cfg.log_every_n_steps == 0
        if self._folder is not None and due:
            self._folder.log(metrics)
            if self._logger is not None:
                figures = {k: v for k, v in metrics.items() if k != "step"}
                self._logger.log_dict(figures, step=counters.step)

    def sync(self) -> None:
        """Wait until the metrics are on disk: a checkpoint of this step comes next."""
        if self._folder is not None:
            self._folder.sync()

    def adapter_saved(self) -> None:
        """The run that this one replaces is no longer needed."""
        if self._folder is not None:
            self._folder.discard_replaced()

    def close(self, loss: TrainingLoss, *, complete: bool) -> None:
        """Close the files; of a complete run show the summary."""
        if self._logger is not None:
            self._logger.close()
        if self._folder is not None:
            self._folder.close()
            if complete:
                print_summary(
                    loss,
                    self._counters,
                    self._run.rows.dropped,
                    output_dir=self._folder.path,
                    ended=self._ended(),
                )

    def _ended(self) -> str | None:
        """Why the probe ended the run, if it did."""
        stop = None if self._run.probe is None else self._run.probe.stop
        last = self._counters.last
        return stop.why(last) if stop is not None and has_stopped(last) else None


def add_figures(line: dict[str, float], defenses: Mapping[str, Defense], name: str) -> None:
    """Add a defense's own figures to a step's, as `<name>_<key>`.

    Raises:
        UserError: There is a figure of that name already, or a defense, in this step or not.
    """
    figures = {f"{name}_{key}": value for key, value in defenses[name].figures().items()}
    taken = sorted(figures.keys() & (line.keys() | defenses.keys()))
    if taken:
        raise UserError(
            f"defenses.{name}: its figure {taken[0].removeprefix(f'{name}_')} is logged as "
            f"{taken[0]}, which is another's name: give one of the two another name"
        )
    line |= figures
