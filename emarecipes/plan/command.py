"""Memory before you rent: `python -m emarecipes.plan CONFIG [--gpus N] [--gpu-memory GB] [k=v]`.

Predicts the peak memory of a device and the operations of a step from a training config, in seconds
and without weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from emarecipes.command import run_alone
from emarecipes.components import check_components
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.machine import native_precision
from emarecipes.models.model_checks import check_lora
from emarecipes.plan.estimate import Load, MemoryEstimate, estimate
from emarecipes.training.component_checks import check_optimizer
from emarecipes.training.settings import check_settings

_GB = 10**9
# CUDA's context and libraries, and the gaps that its allocator leaves: assumed, not measured.
OVERHEAD_GB = 1.5


def run_plan(argv: Sequence[str]) -> int:
    """Print the prediction for `CONFIG [options] [key=value | ~key]...`.

    Returns:
        The exit code: 0; 1 after a `UserError`, or if the step does not fit `--gpu-memory`.
    """
    fits: list[bool] = []
    code = run_alone("emarecipes.plan", lambda arguments: fits.append(_plan(arguments)), argv)
    return code or int(not fits[0])


def _plan(argv: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(prog="python -m emarecipes.plan", allow_abbrev=False)
    parser.add_argument("config", help="a training config")
    parser.add_argument("overrides", nargs="*", help="key=value, or ~key to remove an entry")
    parser.add_argument("--gpus", type=_positive, default=1, help="devices, by FSDP2 (default 1)")
    parser.add_argument("--gpu-memory", type=float, help="GB a device has: does it fit?")
    parser.add_argument("--row-tokens", type=_positive, help="default tokenizer.max_seq_len")
    parser.add_argument("--labelled", type=_share, default=1.0, help="share of labelled tokens")
    options, extra = parser.parse_known_args(argv)
    raw, origin = load_config(["--config", options.config, *options.overrides, *extra])
    cfg = check_settings(raw, origin)
    check_components(cfg, origin)
    if cfg.dtype == "auto":  # A plan is often made for a GPU that is not here.
        device = torch.device(cfg.device or "cpu").type
        here = device == "cpu" or torch.cuda.is_available()
        cfg.dtype = native_precision(device).dtype if here else "bf16"
    tokens = options.row_tokens or cfg.tokenizer.get("max_seq_len")
    if tokens is None:
        raise UserError(
            f"{origin.at('tokenizer.max_seq_len')}: not set, so rows may have any length; say "
            "--row-tokens N"
        )
    tokens += -tokens % cfg.pad_to_multiple_of
    load = Load(options.gpus, tokens, options.labelled)
    check_lora(cfg, origin)
    check_optimizer(cfg, origin, options.gpus)
    found = estimate(cfg, origin, load)
    console = Console(width=100)
    _print(console, cfg, load, found)
    if options.gpu_memory is None:
        return True
    room = options.gpu_memory - OVERHEAD_GB
    if found.peak <= room * _GB:
        console.print(f"Fits {options.gpu_memory:g} GB, {OVERHEAD_GB} GB of it for CUDA itself.")
        return True
    console.print(
        f"Does not fit {options.gpu_memory:g} GB, of which {OVERHEAD_GB} GB are for CUDA itself. "
        "What would change that, each with those above it:"
    )
    for text, change in changes(cfg, origin, load):
        console.print(f"  {text}: {change.peak / _GB:.1f} GB", highlight=False)
        if change.peak <= room * _GB:
            console.print("  and it fits")
            break
    else:
        console.print("  and it still does not fit: a larger device, or a smaller model")
    return False


def changes(cfg: DictConfig, origin: Origin, load: Load) -> Iterator[tuple[str, MemoryEstimate]]:
    """Changes that need less memory, from those that cost least, each on top of those before."""
    cfg = cfg.copy()
    if not cfg.enable_activation_checkpointing:
        cfg.enable_activation_checkpointing = True
        yield "enable_activation_checkpointing=true", estimate(cfg, origin, load)
    while cfg.batch_size > 1:
        size = cfg.batch_size
        factor = next(n for n in range(2, size + 1) if size % n == 0)  # The step stays the same.
        cfg.batch_size //= factor
        cfg.gradient_accumulation_steps *= factor
        text = (
            f"batch_size={cfg.batch_size} "
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}"
        )
        yield text, estimate(cfg, origin, load)
    for gpus in (2, 4, 8):
        if gpus > load.gpus:
            try:
                check_optimizer(cfg, origin, gpus)
            except UserError:
                return  # It is for one process.
            load = Load(gpus, load.row_tokens, load.labelled)
            yield f"--gpus {gpus}", estimate(cfg, origin, load)


def _print(console: Console, cfg: DictConfig, load: Load, found: MemoryEstimate) -> None:
    devices = "one device" if load.gpus == 1 else f"each of {load.gpus} devices"
    console.print(f"Predicted peak on {devices}, {cfg.dtype}", highlight=False)
    table = Table("")
    table.add_column("GB", justify="right")
    for name, size in found.parts.items():
        if size:
            table.add_row(name, f"{size / _GB:.2f}")
    table.add_row("sum", f"{found.peak / _GB:.2f}", style="bold")
    console.print(table)
    console.print(
        f"{cfg.batch_size} rows of {load.row_tokens} tokens a device, {load.labelled:.0%} of them "
        f"labelled, activation checkpointing {_on(cfg.enable_activation_checkpointing)}.\n"
        f"A step: {found.tokens} tokens, {found.flops / 1e12:.3g} TFLOP on all devices.",
        highlight=False,
    )


def _on(value: bool) -> str:
    return "on" if value else "off"


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _share(text: str) -> float:
    if not 0.0 < float(text) <= 1.0:
        raise ValueError
    return float(text)
