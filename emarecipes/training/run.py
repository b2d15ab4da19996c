"""The command behind `recipes/ema_lora.py`: check together, train, leave cleanly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchtune import training

from emarecipes.command import explain, report
from emarecipes.errors import UserCodeError, UserError
from emarecipes.training.checks import CheckedRun, check_run
from emarecipes.training.recipe import recipe_class


def run_lora(argv: Sequence[str]) -> int:
    """Train one adapter as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    # torchtune's norm computes in float32 with scales in bf16, once said a run.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    distributed = training.is_distributed()
    if distributed:
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if distributed else 0
    try:
        run = _check_together(argv) if distributed else check_run(argv, world_size=1, rank=0)
        if run.cfg.fsdp_cpu_offload:
            training.set_torch_num_threads()
        recipe = recipe_class(distributed=distributed)(run)
        recipe.setup()
        recipe.train()
    except Exception as error:
        ended = explain(error)
        if isinstance(ended, UserCodeError):
            # Maybe on this process alone: the launcher ends the others, who wait for it.
            report(ended, rank if distributed else None)
            return 1
        if rank == 0:
            report(ended)
        _leave()
        return 1
    _leave()
    return 0


def _check_together(argv: Sequence[str]) -> CheckedRun:
    """`check_run` on every process; if it fails on one, the same error is raised on all.

    Otherwise the launcher would end the first process before it could say what is wrong.
    """
    found: CheckedRun | None = None
    error: str | None = None
    try:
        found = check_run(argv, dist.get_world_size(), dist.get_rank())
    except UserError as user_error:
        if isinstance(explain(user_error), UserCodeError):
            raise  # With its traceback.
        error = str(user_error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise UserError(first)
    assert found is not None
    return found


def _leave() -> None:
    """Leave the process group. Without the barrier, gloo fails at exit about once in ten runs.

    Every `UserError` of a run is raised on all processes alike, so that all of them come here.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
