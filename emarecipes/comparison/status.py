"""What a comparison is doing, and about when it will be done: one line, refreshed in place."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emarecipes.comparison.arms import Arm, Job
from emarecipes.progress import Note, duration

Work = Literal["training", "answers", "scores"]

# Seconds of a step of these kinds over those of a training, until one of its kind has ended.
_GUESS = {"answers": 0.3, "scores": 0.6}
# Between two looks in a terminal, and between two lines in a file.
_REFRESH, _SECONDS_A_LINE = 1.0, 60.0


@dataclass
class Piece:
    """A step of the comparison that is to come, runs, or has run.

    Attributes:
        title: For people.
        kind: What it does; pieces of a kind and task are taken to cost alike.
        task: Its task.
        size: Its part of a whole training's steps, where the config says how many.
        note: Where the recipe that runs says how far it is.
    """

    title: str
    kind: Work
    task: str
    size: float = 1.0
    note: Path | None = None
    started: float | None = None
    seconds: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.started is not None and self.seconds is None


@dataclass
class Status:
    """The pieces of a comparison, and the line that tells of them.

    Attributes:
        at_a_time: How many trainings or samplings run side by side.
    """

    at_a_time: int = 1
    pieces: dict[str, Piece] = field(default_factory=dict)  # By title.

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._next_line = 0.0
        self._shown: tuple[str, ...] = ()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Add what is to come."""
        with self._lock:
            for piece in pieces:
                self.pieces.setdefault(piece.title, piece)

    def drop(self, title: str) -> None:
        """It need not be done: it is there already, or cannot be."""
        with self._lock:
            if (piece := self.pieces.get(title)) is not None and piece.started is None:
                del self.pieces[title]

    @contextmanager
    def running(self, title: str, note: Path) -> Iterator[None]:
        """Within this context the piece of that title runs."""
        note.unlink(missing_ok=True)
        piece = self.pieces.get(title)
        if piece is not None:
            piece.note, piece.started, piece.seconds = note, time.time(), None
        try:
            yield
        finally:
            if piece is not None and piece.started is not None:
                piece.seconds = time.time() - piece.started
            note.unlink(missing_ok=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within this context the line is shown on stderr."""
        ended = threading.Event()
        thread = threading.Thread(target=self._show, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """How many pieces are done, what runs and how far it is, and the time left of all."""
        with self._lock:
            pieces = list(self.pieces.values())
        done = sum(piece.seconds is not None for piece in pieces)
        running = [piece for piece in pieces if piece.is_running]
        parts = [f"{done} of {len(pieces)} done"]
        for piece in running:
            note = None if piece.note is None else Note.read(piece.note)
            parts.append(f"{piece.title}, {note}" if note else f"{piece.title}, starting")
        left = self.seconds_left()
        if left is not None and done < len(pieces):
            parts.append(f"about {duration(left)} left of all")
        return " | ".join(parts)

    def seconds_left(self) -> float | None:
        """Of all pieces; None until a training is under way or anything has ended."""
        with self._lock:
            pieces = list(self.pieces.values())
        left, shared = 0.0, 0.0
        for piece in pieces:
            if piece.seconds is not None:
                continue
            expected = _expected(piece, pieces)
            if expected is None:
                return None
            spent = 0.0 if piece.started is None else time.time() - piece.started
            rest = max(0.0, expected - spent)
            if piece.kind == "scores":  # One after the other, each with all of the machine.
                left += rest
            else:
                shared += rest
        return left + shared / self.at_a_time

    def _show(self, ended: threading.Event) -> None:
        while not ended.wait(_REFRESH):
            if sys.stderr.isatty():
                print(f"\r\033[K{self.line()}", end="", file=sys.stderr, flush=True)
                continue
            titles = tuple(piece.title for piece in self.pieces.values() if piece.is_running)
            if titles and (titles != self._shown or time.time() > self._next_line):
                self._shown, self._next_line = titles, time.time() + _SECONDS_A_LINE
                print(self.line(), file=sys.stderr, flush=True)


def _told(piece: Piece) -> float | None:
    """Seconds of a running piece by what its recipe tells: of a training all, of others at least.

    Those do several things, of which they tell one after the other.
    """
    note = Note.read(piece.note) if piece.is_running and piece.note is not None else None
    left = None if note is None else note.seconds_left()
    if left is None or piece.started is None:
        return None
    return time.time() - piece.started + left


def _measured(piece: Piece) -> float | None:
    """Seconds that a whole piece of its kind takes, by how this one goes or went."""
    seconds = _told(piece) if piece.kind == "training" else None
    if piece.seconds is not None:
        seconds = piece.seconds
    return None if seconds is None else seconds / piece.size


def _mean(pieces: Sequence[Piece]) -> float | None:
    found = [seconds for piece in pieces if (seconds := _measured(piece)) is not None]
    return sum(found) / len(found) if found else None


def _expected(piece: Piece, pieces: Sequence[Piece]) -> float | None:
    """Seconds: by its own rate, else by pieces like it, else by any, with a guess between kinds.

    At least what its recipe tells. That says nothing of others: the first has the base's rows too.
    """
    own = _measured(piece)
    like = [p for p in pieces if p.kind == piece.kind]
    told = _told(piece) or 0.0
    same = _mean([p for p in like if p.task == piece.task])
    for seconds in (own, same, _mean(like)):
        if seconds is not None:
            return max(seconds * piece.size, told)
    trained = _mean([p for p in pieces if p.kind == "training"])
    if trained is None:
        return None
    return max(trained * _GUESS.get(piece.kind, 1.0) * piece.size, told)


def pieces_of(jobs: Sequence[Job], arms: Sequence[Arm]) -> list[Piece]:
    """The trainings of a comparison and the scores of its arms, as far as its config says."""
    most = max((_steps(job) for job in jobs), default=0.0) or 1.0
    found = [
        Piece(training_title(job), "training", job.task, (_steps(job) or most) / most)
        for job in jobs
    ]
    found += [
        Piece(scores_title(arm, task), "scores", task)
        for arm in arms
        if arm.config is not None
        for task in arm.tasks
    ]
    return found


def training_title(job: Job) -> str:
    """Of a training run, for people."""
    return f"{job.arm.label}, {job.task} task, seed {job.seed}: training"


def answers_title(job: Job) -> str:
    """Of the answers of a training run, for people."""
    return f"{job.arm.label}, {job.task} task, seed {job.seed}: answers"


def scores_title(arm: Arm, task: str) -> str:
    """Of an arm's scores, for people."""
    return f"{arm.label}, {task} task: scores"


def _steps(job: Job) -> float:
    """Steps that a config states, those with a reference counted half as much again; 0: unknown."""
    steps = (job.cfg.get("max_steps_per_epoch") or 0) * (job.cfg.get("epochs") or 1)
    return float(steps) * (1.4 if job.cfg.get("defenses") else 1.0)
