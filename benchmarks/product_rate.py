"""How fast a step's matrix products are, over one large product alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
SIZE = 2048


def product_rate(step: Callable[[], object], dtype: torch.dtype) -> str:
    """A line with the operations, time and rate of a step's products, attention's left out.

    The profiler counts no operations for `addmm_`, so its time is named and not in the rate.
    """
    one = torch.randn(SIZE, SIZE).to(dtype)
    alone = min(_seconds(one) for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        step()
    events = {e.key: e for e in found.key_averages() if e.key in PRODUCTS}
    counted = [e for e in events.values() if e.flops]
    seconds = sum(e.self_cpu_time_total for e in counted) / 1e6
    others = sum(e.self_cpu_time_total for e in events.values() if not e.flops) / 1e6
    operations = sum(e.flops for e in counted)
    rate, largest = operations / seconds / 1e9, 2 * SIZE**3 / alone / 1e9
    return (
        f"products {operations / 1e9:.0f} GFLOP in {seconds:.2f} s (not counted: {others:.2f} s), "
        f"{rate:.0f} GFLOP/s; one of {SIZE}^3 alone {largest:.0f}; ratio {rate / largest:.2f}"
    )


def _seconds(one: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(one, one)
    return time.perf_counter() - started
