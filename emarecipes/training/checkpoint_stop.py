"""SIGTERM and SIGINT as a request that the training loop reads between two steps."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within this context a SIGTERM or SIGINT is noted; the loop then stops by itself.

    Args:
        alone: Whether this is the run's only process. Then a second Ctrl-C ends it at once; a
            launcher sends every worker several signals by itself.
    """

    def __init__(self, *, alone: bool) -> None:
        self.made = False
        self._alone = alone
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
        if self.made and self._alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.made:
            name = signal.Signals(number).name
            print(f"\n{name}: stopping after this step", file=sys.stderr, flush=True)
        self.made = True
