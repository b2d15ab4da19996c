"""When a run's checkpoints are written and which are kept, and how a signal asks for the last one.

SIGTERM and SIGINT are a request that the training loop reads between two steps. A second one ends
the step under way, which is then lost; what was trained before is still saved.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torchtune import utils

from emarecipes.command import on_first_process
from emarecipes.output_dir import CHECKPOINTS
from emarecipes.training.checkpoint import (
    Checkpoint,
    Counters,
    checkpoint_steps,
    delete_checkpoints,
    write_checkpoint,
)
from emarecipes.training.checkpoint_state import TrainingState

log = utils.get_logger("INFO")


class CheckpointSaver:
    """Writes `<output_dir>/checkpoints/step_N`, and deletes old ones once a new one is on disk.

    Args:
        output_dir: The run's.
        state: What is stored.
        run: What `run.json` says of the run; see `emarecipes.training.checkpoint_resume`.
        every: `save_every_n_steps`.
        keep: `keep_last`.
        resumed: What the run goes on from, if anything.
    """

    def __init__(
        self,
        output_dir: Path,
        state: TrainingState,
        run: dict[str, Any],
        *,
        every: int | None,
        keep: int,
        resumed: Checkpoint | None,
    ) -> None:
        self.last_step = None if resumed is None else resumed.counters.step
        self._folder = output_dir / CHECKPOINTS
        self._state = state
        self._run = run
        self._every = every
        self._keep = keep

    def due(self, step: int, *, last: bool) -> bool:
        """Every so many steps; after the last step too, if the run writes or has any."""
        if last:
            return self._every is not None or self.last_step is not None
        return self._every is not None and step % self._every == 0

    def save(self, counters: Counters) -> None:
        """Write a checkpoint of this step. Every process must call it.

        Raises:
            UserError: On every process alike: no room, a write that fails, a value of the adapter
                that is not finite.
        """
        if counters.step in (0, self.last_step):
            return
        adapter, training = self._state.adapter(), self._state.training()
        on_first_process(lambda: self._write(adapter, training, counters))
        self.last_step = counters.step

    def delete_newer(self) -> None:
        """Delete what is newer than the checkpoint that the run goes on from.

        It is damaged, or of a course that the run now leaves: its lines are cut from the metrics.
        """
        newer = [s for s in checkpoint_steps(self._folder) if s > (self.last_step or math.inf)]
        if newer:
            log.warning(f"Deleting checkpoints newer than step {self.last_step}: {newer}")
            delete_checkpoints(self._folder, newer)

    def _write(self, adapter: Any, training: Any, counters: Counters) -> None:
        write_checkpoint(self._folder, adapter, training, self._run, counters)
        steps = checkpoint_steps(self._folder)
        delete_checkpoints(self._folder, steps[: -self._keep])


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepAbandonedError(BaseException):
    """A second signal came while a step could be given up. No Exception: nobody may swallow it."""


class StopRequest:
    """Within this context a SIGTERM or SIGINT is noted; the loop then stops by itself.

    Args:
        alone: Whether this is the run's only process. Then a second signal gives up the step under
            way; a launcher sends every worker several by itself.
    """

    def __init__(self, *, alone: bool) -> None:
        self.made = False
        self._alone = alone
        self._can_be_abandoned = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.made and self._can_be_abandoned:
            self._can_be_abandoned = False
            print(f"\n{name}: giving up this step", file=sys.stderr, flush=True)
            raise StepAbandonedError
        if not self.made:
            more = "; once more to stop now, without it" if self._alone else ""
            print(f"\n{name}: stopping after this step{more}", file=sys.stderr, flush=True)
        self.made = True

    @contextmanager
    def can_be_abandoned(self) -> Iterator[None]:
        """While all that is computed can be thrown away, a second signal does so."""
        self._can_be_abandoned = self._alone
        try:
            yield
        finally:
            self._can_be_abandoned = False
