"""Ctrl-C or SIGTERM while a recipe samples, scores or judges: answered at once, nothing lost.

Trainings, which write a checkpoint first, have `training.checkpoint_save`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from emarecipes.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a signal has asked for the end.

    Attributes:
        asked: A signal came, and the batch under way may end.
    """

    def __init__(self, kept: str, in_batches: bool) -> None:
        self.asked = False
        self._kept = kept
        self._in_batches = in_batches
        # A launcher passes a signal on to every process, several times.
        self._alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        self._first = int(os.environ.get("RANK", 0)) == 0

    def heed(self) -> None:
        """To be called between two batches, with all written that was computed.

        Raises:
            UserError: A signal has asked for the end.
        """
        if self.asked:
            raise UserError(f"stopped; {self._kept}")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = not self._in_batches or (self.asked and self._alone)
        how = "now" if now else "after this batch"
        if not now and self._alone:
            how += "; once more to stop now, without it"
        if now or (self._first and not self.asked):
            print(f"\n{signal.Signals(number).name}: stopping {how}", file=sys.stderr, flush=True)
        self.asked = True
        if now:
            raise KeyboardInterrupt


@contextmanager
def stoppable(kept: str, *, in_batches: bool = False) -> Iterator[Stop]:
    """Within this context a signal ends the work, with one line that says what is kept.

    Args:
        kept: What is left of the work, and how to go on with it: the line's end.
        in_batches: A first signal is heeded at `Stop.heed`, only a second one at once.

    Raises:
        UserError: It was stopped.
    """
    stop = Stop(kept, in_batches)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Which hears no signals.
        return
    before = [signal.signal(number, stop._hear) for number in _SIGNALS]
    try:
        yield stop
    except KeyboardInterrupt:
        raise UserError(f"stopped; {kept}") from None
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
