"""SIGTERM and SIGINT as a request that the training loop reads between two steps.

A second one ends the step under way, which is then lost; what was trained before is still saved.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

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
