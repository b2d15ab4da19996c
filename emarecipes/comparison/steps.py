"""A step of a comparison: when it is done, and where it runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from emarecipes.comparison.settings import Plan
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.files import write_json
from emarecipes.machine import threads_given, usable_cores

Place = dict[str, str]  # What a run has in its environment besides.


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: For people.
        name: Of its log.
        mark: The file that holds its fingerprint once it has ended well.
        fingerprint: Of what it depends on.
    """

    title: str
    name: str
    mark: Path
    fingerprint: str

    def is_done(self) -> bool:
        """Whether it has ended well with this fingerprint."""
        return self.is_in(self.mark)

    def is_in(self, mark: Path) -> bool:
        """Whether this file holds its fingerprint."""
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == {"fingerprint": self.fingerprint})

    def write(self, mark: Path) -> None:
        """Put its fingerprint into this file."""
        write_json(mark, {"fingerprint": self.fingerprint}, indent=None)


def places(plan: Plan, origin: Origin) -> list[Place]:
    """A place for each of the runs at a time: its share of cores, and GPUs of its own.

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
        for number, place in enumerate(found):
            own = names[number * each : (number + 1) * each]
            place["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return found
