"""Steps of arms in turns: what each takes, and on which machine."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from emarecipes.machine import native_precision
from emarecipes.models.batch import Batch


class Trainer:
    def __init__(self, model: nn.Module, backward: Callable[[Batch], list[float]]) -> None:
        self._weights, self._backward = list(model.parameters()), backward
        self._optimizer = torch.optim.AdamW(self._weights, lr=5e-4, weight_decay=0.01)

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
