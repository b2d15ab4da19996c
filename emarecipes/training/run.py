"""The command behind `recipes/ema_lora.py`: check together, train, leave cleanly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchtune import training

from emarecipes.command import leave_processes, together
from emarecipes.errors import UserError
from emarecipes.training.checks import check_run
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
        world_size = dist.get_world_size() if distributed else 1
        run = together(lambda: check_run(argv, world_size, rank))
        if run.cfg.fsdp_cpu_offload:
            training.set_torch_num_threads()
        recipe = recipe_class(distributed=distributed)(run)
        recipe.setup()
        recipe.train()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_processes()
        return 1
    leave_processes()
    return 0
