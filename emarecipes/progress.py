"""How far a long piece of work is: a bar in a terminal, lines in a file, and a note for a parent.

A terminal's bar is refreshed in place. Where the output is a file, a line is written after the
first units and then for about every tenth of the work. `ema_compare` names a file to the recipes
that it starts, into which they write how far they are; it shows that, and the time left of all.
"""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emarecipes.files import whole

# Names the file that a parent reads.
NOTE = "EMARECIPES_PROGRESS"

_LINES, _SECONDS_A_LINE, _SECONDS_A_NOTE = 10, 15.0, 0.5


@dataclass(frozen=True)
class Note:
    """What a recipe tells its parent.

    Attributes:
        title: Of the work; empty for a training.
        done: Units of it that are done.
        total: All of them.
        unit: What one is.
        seconds: Since the work began.
        first: Units that were done before it began.
    """

    title: str
    done: int
    total: int
    unit: str
    seconds: float
    first: int = 0

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """None if there is none (yet)."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def seconds_left(self) -> float | None:
        """At the rate so far; None before the first unit."""
        done = self.done - self.first
        return self.seconds / done * (self.total - self.done) if done > 0 else None

    def __str__(self) -> str:
        title = f"{self.title}: " if self.title else ""
        return f"{title}{self.unit} {self.done} of {self.total}"


class Progress(tqdm):
    """tqdm's bar, with a number of units known beforehand."""

    fp: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.time()
        self._next_line = self._next_note = 0.0
        self._lines, self._written = 0, int(kwargs.get("initial", 0))
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show how far the work is; called by tqdm, at most ten times a second."""
        self._tell_parent()
        if self.fp.isatty():
            return super().display(msg, pos)
        if msg != "":  # As which tqdm clears a bar.
            self._write_line()
        return True

    def close(self) -> None:
        """Leave the bar where it is; in a file, the last line."""
        if not self.disable and not self.fp.isatty():
            self._write_line()
            self.fp = io.StringIO()  # Which takes the line break that tqdm ends a bar with.
        super().close()

    def note(self) -> Note:
        """How far it is."""
        seconds = time.time() - self._began
        title = (self.desc or "").removesuffix(": ")
        return Note(title, int(self.n), int(self.total or 0), self.unit, seconds, int(self.initial))

    def _write_line(self) -> None:
        note, now = self.note(), time.time()
        due = note.done - note.first >= (note.total - note.first) * self._lines / _LINES
        ended = note.total > 0 and note.done >= note.total
        early = now < self._next_line and not ended
        if note.done <= self._written or not (due or ended) or early:
            return
        self._written = note.done
        self._lines = _LINES * (note.done - note.first) // max(1, note.total - note.first) + 1
        self._next_line = now + _SECONDS_A_LINE
        left = note.seconds_left()
        rest = "" if ended or left is None else f", about {duration(left)} left"
        after = f" ({self.postfix})" if self.postfix else ""
        print(f"{note}, {duration(note.seconds)}{rest}{after}", file=self.fp, flush=True)

    def _tell_parent(self) -> None:
        path, now = os.environ.get(NOTE), time.time()
        if path is None or now < self._next_note:
            return
        self._next_note = now + _SECONDS_A_NOTE
        with whole(Path(path), synced=False) as partial:
            partial.write_text(json.dumps(asdict(self.note())), encoding="utf-8")


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
