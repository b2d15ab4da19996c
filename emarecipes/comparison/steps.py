"""Steps of a comparison: when one is done, where it runs, and that it is stopped with the rest."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from emarecipes.comparison import process
from emarecipes.comparison.arms import Job
from emarecipes.comparison.settings import Plan
from emarecipes.comparison.status import Status
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.machine import threads_given, usable_cores
from emarecipes.progress import NOTE
from emarecipes.training.run import STOPPED

Slot = dict[str, str]  # What a run has in its environment besides.


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: For people.
        name: Of its log.
        mark: The file that holds its fingerprint once it has ended well.
        fingerprint: Of what it depends on.
        made: A folder whose files are what it makes, if it says so.
    """

    title: str
    name: str
    mark: Path
    fingerprint: str
    made: Path | None = None

    def is_done(self) -> bool:
        """Whether it has ended well with this fingerprint, and the files it made are all there."""
        if self.made is not None and not self.made.is_dir():
            return False
        made = _read(self.mark).get("made", [])
        return self.is_in(self.mark) and set(made) <= set(self._files())

    def is_in(self, mark: Path) -> bool:
        """Whether this file holds its fingerprint."""
        return bool(_read(mark).get("fingerprint") == self.fingerprint)

    def write(self, mark: Path) -> None:
        """Put its fingerprint into this file."""
        made = {} if self.made is None else {"made": self._files()}
        write_json(mark, {"fingerprint": self.fingerprint} | made, indent=None)

    def begin(self) -> None:
        """Remove what it made with other settings; what an interruption left of these stays."""
        if self.made is None:
            return
        begun = self.mark.with_suffix(".begun.json")
        if not (self.is_in(self.mark) or self.is_in(begun)):
            shutil.rmtree(self.made, ignore_errors=True)
        begun.parent.mkdir(parents=True, exist_ok=True)
        self.write(begun)

    def _files(self) -> list[str]:
        if self.made is None or not self.made.is_dir():
            return []
        return sorted(path.name for path in self.made.iterdir())


def _read(mark: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def slots(plan: Plan, origin: Origin) -> list[Slot]:
    """A slot for each of the runs at a time: its share of cores, and GPUs of its own.

    Raises:
        UserError: There are fewer GPUs than the runs at a time need.
    """
    count, each = plan.settings.runs_at_a_time, plan.settings.nproc_per_node
    if count == 1:
        return [{}]
    share = max(1, usable_cores() // (count * each))
    # More than its share each, and runs would wait for one another in busy loops.
    threads = str(min(share, threads_given(os.environ.get("OMP_NUM_THREADS", "")) or share))
    found = [{"OMP_NUM_THREADS": threads} for _ in range(count)]
    gpus = torch.cuda.device_count()
    if gpus and gpus < count * each:
        raise UserError(
            f"{origin.at('runs_at_a_time')}: {count} runs of {each} process(es) need "
            f"{count * each} GPUs, and there are {gpus}"
        )
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",")
        for number, slot in enumerate(found):
            own = names[number * each : (number + 1) * each]
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return found


@dataclass
class Steps:
    """The steps of one comparison.

    Attributes:
        plan: The checked config.
        slots: Where training and sampling runs are, one at a time in each.
        failures: What failed and why, a line each.
    """

    plan: Plan
    slots: Sequence[Slot]
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._children: set[process.Started] = set()
        self._stopping = False
        self.status = Status(len(self.slots))

    @property
    def folder(self) -> Path:
        """The comparison's output folder."""
        return Path(self.plan.settings.output_dir)

    def each(self, jobs: Sequence[Job], act: Callable[[Job, Slot], None]) -> None:
        """`act` on every job, one at a time in each slot; after an error on no more."""
        free: SimpleQueue[Slot] = SimpleQueue()
        for slot in self.slots:
            free.put(slot)

        def act_in_slot(job: Job) -> None:
            slot = free.get()
            try:
                act(job, slot)
            finally:
                free.put(slot)

        with ThreadPoolExecutor(len(self.slots)) as pool:
            try:
                for ended in as_completed([pool.submit(act_in_slot, job) for job in jobs]):
                    ended.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop_children()
                raise

    def run_step(self, step: Step, command: list[str], slot: Slot) -> bool:
        """`tune run COMMAND`, its output in a log; whether it ended well. A failure is noted."""
        log = self.folder / "logs" / f"{step.name}.log"
        note = log.with_suffix(".progress")
        log.parent.mkdir(parents=True, exist_ok=True)
        step.mark.unlink(missing_ok=True)
        with self.status.running(step.title, note):
            child = process.start(command, log, os.environ | slot | {NOTE: str(note)})
            self._children.add(child)
            if self._stopping:  # It was just about to start.
                child.terminate()
            try:
                code = child.wait()
            except BaseException:
                self._stop_children()
                child.wait()
                raise
            finally:
                self._children.discard(child)
        said = log.read_text(encoding="utf-8", errors="replace")
        if code == 0 and STOPPED not in said:
            return True
        reason = f"{step.title}: {_reason(said, code)} (log: {log})"
        self.failures.append(reason)
        if not self._stopping:
            print(f"\nfailed: {reason}", file=sys.stderr, flush=True)
        return False

    def _stop_children(self) -> None:
        if not self._stopping:
            self.ask_children()

    def ask_children(self) -> list[str]:
        """Ask what runs to end, a first time or once more; a training writes a checkpoint first.

        Returns:
            The titles of what runs.
        """
        self._stopping = True
        for child in list(self._children):
            child.terminate()
        return [piece.title for piece in self.status.pieces.values() if piece.is_running]


def _reason(said: str, code: int) -> str:
    """The line that a recipe ended with, or the last one there is."""
    lines = [line.strip() for line in said.splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code == 0:
        return "stopped by a signal; the same command goes on from its checkpoint"
    last = next((line for line in reversed(lines) if line), "it said nothing")
    return f"ended with code {code}: {last[:300]}"
