"""Where a process's random numbers stand: read, put back, and kept through what only measures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's, Python's and NumPy's generators, and of the device's own.

    Tensors, numbers, strings and containers of these, so that a checkpoint can hold it.
    """
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` read; on a device without a state there, that of the others."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leaves every generator as it was before, whatever the body draws."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
