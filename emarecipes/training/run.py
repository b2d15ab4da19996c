"""The commands behind `recipes/ema_lora.py` and `ema_cache.py`: check together, leave cleanly."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torchtune import training

from emarecipes.clock import share_today
from emarecipes.command import (
    explain,
    is_of_a_users_defense,
    leave_processes,
    report,
    together,
)
from emarecipes.errors import UserCodeError, UserError, first_line
from emarecipes.machine import set_threads, share_precision
from emarecipes.output_dir import claim
from emarecipes.training.checked import CheckedRun
from emarecipes.training.recipe import LoRATraining
from emarecipes.training.reference_cache_open import open_cache

STOPPED = "Stopped after step"  # How a run says that a signal ended it before its end.


def run_lora(argv: Sequence[str]) -> int:
    """Train one adapter as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, also if a signal stopped the run and it can be resumed; 1 after a
        `UserError`, or after another process was lost, which is printed as one line.
    """
    return _run(argv, train=True)


def run_cache(argv: Sequence[str]) -> int:
    """Fill the `reference_cache` of the training config that `argv` names, without training.

    Returns:
        As `run_lora`.
    """
    return _run(argv, train=False)


def _run(argv: Sequence[str], *, train: bool) -> int:
    distributed = training.is_distributed()
    if distributed:
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
        share_precision()
        share_today()
    set_threads()
    rank = dist.get_rank() if distributed else 0
    recipe: LoRATraining | None = None
    give_back: Callable[[], None] | None = None
    try:
        world_size = dist.get_world_size() if distributed else 1
        run = together(lambda: CheckedRun(argv, world_size, rank, writes_run=train))
        if run.cfg.reference_cache is not None:
            # Last, as it reserves room on the disk.
            run.reference_cache = open_cache(run, quiet=rank != 0)
        if not train and run.reference_cache is None:
            raise UserError(
                f"{run.origin.at('reference_cache')}: name a folder here, and a defense that "
                "reads the reference"
            )
        if train:  # Last, as it makes the folder.
            give_back = together(lambda: _claimed(run) if rank == 0 else None)
        if run.cfg.fsdp_cpu_offload:
            training.set_torch_num_threads()
        built = LoRATraining(run, distributed=distributed)
        built.setup()
        if not train:
            built.cache_reference()
        else:
            recipe = built
            if not recipe.train() and rank == 0:
                done = f"{STOPPED} {recipe.counters.step}."
                print(done, _advice(recipe, argv), flush=True)
    except Exception as error:
        return _end(error, recipe, argv)
    finally:
        if give_back is not None:
            give_back()
    leave_processes()
    return 0


def _claimed(run: CheckedRun) -> Callable[[], None]:
    return claim(Path(run.cfg.output_dir), run.origin.at("output_dir"))


def _end(error: Exception, recipe: LoRATraining | None, argv: Sequence[str]) -> int:
    """Say why the run ended, and leave: together where all processes know, else alone."""
    ended = explain(error)
    rank = dist.get_rank() if dist.is_initialized() else None
    if isinstance(error, RuntimeError) and _is_lost_contact(error):
        # Not left for the launcher, whose last line is to be that other process's.
        reason = f"another process has gone, its own message says why ({first_line(error)})"
        print(f"[rank {rank}] error: {reason}", file=sys.stderr, flush=True)
        return _end_alone(recipe, argv)
    of_a_user = is_of_a_users_defense(error)
    if isinstance(error, OSError) and recipe is not None and not of_a_user:
        # Of one process alone, as a full disk is. The others find out that this one has gone.
        report(UserError(f"{error.filename or 'writing'}: {error.strerror or error}"), rank)
        return _end_alone(recipe, argv)
    if isinstance(ended, UserCodeError) or (of_a_user and rank is not None):
        # Maybe on this process alone: the launcher ends the others, who wait for it.
        report(ended, rank)
        return 1
    if not rank:
        report(ended)
        if recipe is not None:
            print(_advice(recipe, argv), file=sys.stderr, flush=True)
    leave_processes()
    return 1


def _advice(recipe: LoRATraining, argv: Sequence[str]) -> str:
    """What to do next: how to resume, if there is something to resume."""
    step = recipe.checkpoints.last_step
    if step is None:
        return "There is no checkpoint yet: start it again with overwrite=true"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return f"Resume from step {step} with the same command on every node and resume=auto"
    workers = os.environ.get("LOCAL_WORLD_SIZE")
    processes = f" --nproc_per_node {workers}" if workers and dist.is_initialized() else ""
    kept = [a for a in argv if not a.startswith(("resume=", "overwrite="))]
    command = f"tune run{processes} recipes/ema_lora.py {shlex.join([*kept, 'resume=auto'])}"
    return f"Resume from step {step} with: {command}"


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is no longer there."""
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe")
    known = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return dist.is_initialized() and known


def _end_alone(recipe: LoRATraining | None, argv: Sequence[str]) -> int:
    """End this process without waiting for the others, who may never answer."""
    prefix = f"[rank {dist.get_rank()}] " if dist.is_initialized() else ""
    if recipe is not None:
        print(f"{prefix}{_advice(recipe, argv)}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(1)  # Leaving a broken process group the ordinary way can hang.
    return 1
