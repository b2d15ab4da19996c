"""Steps of arms in turns: what each takes, and on which machine.

Either all arms in one process, or each in one of its own (`Turns`), as a user's is: it steps when
its turn comes and sleeps else.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emarecipes.machine import native_precision
from emarecipes.models.batch import Batch


class Trainer:
    def __init__(
        self,
        model: nn.Module,
        backward: Callable[[Batch], list[float]],
        optimizer: Callable[..., Any] = torch.optim.AdamW,
    ) -> None:
        self._weights, self._backward = list(model.parameters()), backward
        trained = [weight for weight in self._weights if weight.requires_grad]
        self._optimizer = optimizer(trained, lr=5e-4, weight_decay=0.01)

    def step(self, batch: Batch) -> dict[str, float]:
        losses = dict(zip(("CE", "KL"), self._backward(batch), strict=False))
        norm = torch.nn.utils.clip_grad_norm_(self._weights, max_norm=1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"forwards": len(losses), **losses, "|grad|": float(norm)}


def native_dtype() -> str:
    return native_precision("cpu").dtype


def describe_machine() -> str:
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu}"
    return f"{machine}, load before the start {os.getloadavg()[0]:.2f}"


def measure_time(trainers: Any, batch: Batch, repetitions: int, peaks: dict[str, float]) -> Any:
    figures: Any = {name: trainer.step(batch) | {"all": []} for name, trainer in trainers.items()}
    for repetition in range(1 + repetitions):
        for name, trainer in trainers.items():
            gc.collect()
            started = time.perf_counter()
            trainer.step(batch)
            if repetition > 0:
                figures[name]["all"].append(time.perf_counter() - started)
    for name, figure in figures.items():
        low, middle, high = np.percentile(figure["all"], (25, 50, 75))
        figure |= {"seconds": float(middle), "IQR": float(high - low)}
        if name in peaks:
            figure["peak MB"] = peaks[name]
    return figures


class Turns:
    """Arms in processes of their own, each of which runs `answer_turns`; started one by one.

    Args:
        commands: Arguments of this script, by arm.
    """

    def __init__(self, commands: dict[str, Sequence[str]]) -> None:
        self._processes = {}
        for name, arguments in commands.items():
            command = [sys.executable, sys.argv[0], *arguments]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL, **pipes)
            self._processes[name] = process
            if process.stdout.readline().strip() != "ready":
                sys.exit(f"{name} did not start")

    def step(self, name: str) -> tuple[float, float]:
        """A step of this arm: seconds on the wall, and of all its threads' processors."""
        process = self._processes[name]
        process.stdin.write("\n")
        process.stdin.flush()
        wall, processors = process.stdout.readline().split()
        return float(wall), float(processors)

    def end(self) -> None:
        for process in self._processes.values():
            process.stdin.close()
            process.wait()


def answer_turns(step: Callable[[], object]) -> None:
    """Warm up with two steps; then take one for each line that comes, and say what it took."""
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        step()
        print(time.perf_counter() - started, time.process_time() - worked, flush=True)
