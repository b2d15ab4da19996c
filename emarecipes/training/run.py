"""The commands behind `recipes/ema_lora.py` and `ema_cache.py`: check together, leave cleanly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torchtune import training

from emarecipes.errors import UserError
from emarecipes.training.checks import CheckedRun, check_run
from emarecipes.training.recipe import LoRATraining, recipe_class


def run_lora(argv: Sequence[str]) -> int:
    """Train one adapter as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return _run(argv, _train)


def run_cache(argv: Sequence[str]) -> int:
    """Fill the `reference_cache` of the training config that `argv` names, without training.

    Returns:
        As `run_lora`.
    """
    return _run(argv, _cache, writes_run=False)


def _train(recipe: LoRATraining) -> None:
    recipe.setup()
    recipe.train()


def _cache(recipe: LoRATraining) -> None:
    if recipe.run.reference_cache is None:
        raise UserError(
            f"{recipe.run.origin.at('reference_cache')}: name a folder here, and a defense that "
            "reads the reference"
        )
    recipe.setup()
    recipe.cache_reference()


def _run(
    argv: Sequence[str], work: Callable[[LoRATraining], None], *, writes_run: bool = True
) -> int:
    # torchtune's norm computes in float32 with scales in bf16, once said a run.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    distributed = training.is_distributed()
    if distributed:
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if distributed else 0
    try:
        run = (
            _check_together(argv, writes_run) if distributed else check_run(argv, 1, 0, writes_run)
        )
        if run.cfg.fsdp_cpu_offload:
            training.set_torch_num_threads()
        work(recipe_class(distributed=distributed)(run))
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave()
        return 1
    _leave()
    return 0


def _check_together(argv: Sequence[str], writes_run: bool) -> CheckedRun:
    """`check_run` on every process; if it fails on one, the same error is raised on all.

    Otherwise the launcher would end the first process before it could say what is wrong.
    """
    found: CheckedRun | None = None
    error: str | None = None
    try:
        found = check_run(argv, dist.get_world_size(), dist.get_rank(), writes_run)
    except UserError as user_error:
        error = str(user_error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None or found is None:
        raise UserError(first)
    return found


def _leave() -> None:
    """Leave the process group. Without the barrier, gloo fails at exit about once in ten runs.

    Every `UserError` of a run is raised on all processes alike, so that all of them come here.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
