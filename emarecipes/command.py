"""What the commands share: one line for what a user can mend, and processes that fail together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from emarecipes.errors import UserError

_Result = TypeVar("_Result")


def together(work: Callable[[], _Result]) -> _Result:
    """Call `work()` on every process; if it fails on one, the same error is raised on all.

    Otherwise the launcher would end the first process before it could say what is wrong, and the
    others would wait for one that has gone.

    Raises:
        UserError: The first process's that has one.
    """
    if not dist.is_initialized():
        return work()
    found: list[_Result] = []
    error: str | None = None
    try:
        found.append(work())
    except UserError as user_error:
        error = str(user_error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise UserError(first)
    return found[0]


def leave_processes() -> None:
    """Leave the process group. Without the barrier, gloo fails at exit about once in ten runs.

    Every `UserError` of a run is raised on all processes alike, so that all of them come here.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_alone(name: str, work: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Call `work(argv)` and turn what a user can mend into one line.

    Args:
        name: The recipe's, for messages.
        work: The command.
        argv: `--config FILE` and overrides.

    Returns:
        The exit code: 0, or 1 after a `UserError`, a lack of memory, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return _refuse_processes(name)
    try:
        work(argv)
    except UserError as error:
        return _fail(str(error))
    except torch.OutOfMemoryError:
        return _fail("out of the device's memory; lower batch_size")
    return 0


def _refuse_processes(name: str) -> int:
    """Say it once; the barrier keeps the launcher from ending the first process before."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        _fail(f"{name} runs in one process; leave --nproc_per_node out")
    dist.barrier()
    dist.destroy_process_group()
    return 1


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return 1
