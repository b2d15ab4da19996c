"""What a run says of itself while it trains: its folder's files, its metric logger, its summary."""

from __future__ import annotations

from torchtune.config import instantiate

from emarecipes.training.checkpoint import Counters
from emarecipes.training.checks import CheckedRun
from emarecipes.training.probe_stop import has_stopped
from emarecipes.training.run_folder import RunFolder
from emarecipes.training.step import TrainingLoss
from emarecipes.training.summary import print_summary


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
