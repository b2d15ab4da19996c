"""What this machine can do: how many cores a process may use, and what it computes natively in."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torchtune import utils

from emarecipes.config import Origin

log = utils.get_logger("INFO")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What `OMP_NUM_THREADS` was when `tune` was called: torchrun sets it to 1 for its workers.
GIVEN_THREADS = "EMARECIPES_OMP_NUM_THREADS"

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_shared: dict[str, Precision] = {}


@dataclass(frozen=True)
class Precision:
    """What a device computes in natively, and how that is known."""

    dtype: Literal["bf16", "fp32"]
    reason: str


def native_precision(kind: str) -> Precision:
    """bf16 where a kind of device, `cpu` or `cuda`, computes it natively, else fp32.

    A GPU does from compute capability 8.0 on, an x86 CPU with AMX or AVX512-BF16. Where a CPU's
    flags are not enough (they promise it, while a variable may forbid the library to use it; or it
    is no x86) some products are timed.
    """
    if kind not in _shared:
        _shared[kind] = _native_precision(kind)
    return _shared[kind]


def share_precision() -> None:
    """Take the first process's `native_precision` on all, before a config is read."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [{kind: native_precision(kind) for kind in kinds}]
    dist.broadcast_object_list(found, src=0)
    _shared.update(found[0])


def _native_precision(kind: str) -> Precision:
    if kind == "cuda" and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU computes it natively")
        return Precision("fp32", "this GPU has no bf16 units")
    if kind != "cpu":
        return Precision("fp32", f"nothing is known of bf16 on {kind}")
    promised = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if not promised and platform.machine().lower() in ("x86_64", "amd64"):
        return Precision("fp32", "this CPU has no bf16 units (neither AMX nor AVX512-BF16)")
    speed = bf16_speed()
    if speed > 1:
        return Precision("bf16", f"products are {speed:.1f} times as fast as in fp32 here")
    return Precision("fp32", f"bf16 products run at {speed:.2g} of fp32's rate here")


@cache
def bf16_speed() -> float:
    """The rate of a bf16 matrix product on this CPU over that of an fp32 one.

    Takes 20 ms, and 0.3 s where bf16 is slow. On one thread and in that thread's processor time:
    what else runs here does not count. Fewer rows would time the pages that weights are packed in.
    """
    seconds = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            tries: list[float] = []
            while len(tries) < 3 or (len(tries) < 9 and sum(tries) < 0.02):
                started = time.thread_time()
                torch.mm(x, w)
                tries.append(time.thread_time() - started)
            seconds[dtype] = min(tries)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def settle_dtype(cfg: DictConfig, origin: Origin, kept: str | None = None) -> None:
    """Put what `dtype: auto` means into the config, and say what and why.

    Args:
        cfg: With `device` and `dtype`.
        origin: Where they were written.
        kept: What the run that goes on has been computed in so far, if one goes on.
    """
    device = torch.device(cfg.device or "cpu")
    if cfg.dtype == "auto":
        native = native_precision(device.type)
        cfg.dtype = kept or native.dtype
        if kept is None or kept == native.dtype:
            _say(f"dtype: {native.dtype} ({native.reason})")
        else:
            _say(
                f"dtype: {kept}, as what goes on was begun; this machine would choose "
                f"{native.dtype} ({native.reason})"
            )
    elif cfg.dtype == "bf16" and native_precision(device.type).dtype == "fp32":
        why = native_precision(device.type).reason
        if device.type == "cpu":
            why = f"bf16 products run at {bf16_speed():.2g} of fp32's rate on this CPU"
        _say(f"{origin.at('dtype')}: {why}; dtype: auto would choose fp32")


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(line)


# --- cores ---------------------------------------------------------------------------------


def usable_cores() -> int:
    """The cores that this process may keep busy: its affinity, and its cgroups' quotas.

    A quota of 1.5 cores is 2: two threads that wait half a period now and then are faster than one.
    Quotas are looked up at the process's own group and all above it, which libraries that know of
    quotas leave out: they read the root alone, as it is seen in a container.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores that each cgroup above this process allows it, where it has a quota."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        named = controllers.split(",")
        if controllers and "cpu" not in named:
            continue
        for mount in [_CGROUPS] if not controllers else [_CGROUPS / controllers, _CGROUPS / "cpu"]:
            group = mount / own.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").is_file():  # cgroup v2
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip()
                for name in ("quota", "period")
            )
        if quota != "max" and float(quota) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError):
        return


def set_threads() -> None:
    """Compute on this process's share of the usable cores, or on what OMP_NUM_THREADS says."""
    share = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    given = os.environ.get(GIVEN_THREADS, os.environ.get("OMP_NUM_THREADS", ""))
    threads = threads_given(given)
    if given and threads is None:
        _say(f"OMP_NUM_THREADS={given} is no number of threads; using {share}")
    torch.set_num_threads(threads or share)


def threads_given(text: str) -> int | None:
    """What OMP_NUM_THREADS says, the first level of a list; None if it is not a number above 0."""
    first = text.split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def keep_compiled_apart() -> None:
    """Give what `torch.compile` keeps a folder of its own where ATEN_CPU_CAPABILITY is set.

    Inductor's cache does not ask for it (torch 2.14.1): what was compiled for AVX-512 is read under
    `avx2` with vectors of half the width, and the numbers are wrong without a word
    (findings/inductor_cache_of_other_vectors.sh).
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # A second, for who compiles.

    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability and not cache_dir().endswith(f"cpu_{capability}"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache_dir()) / f"cpu_{capability}")
