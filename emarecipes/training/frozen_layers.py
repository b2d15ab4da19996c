"""`freeze_after`: adapters that keep what they began with, in the layers behind a chosen one."""

from __future__ import annotations

import re

from omegaconf import DictConfig
from torch import nn
from torchtune import utils
from torchtune.modules.peft import get_adapter_params

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.models._torchtune import plain_name

log = utils.get_logger("INFO")


def adapter_behind(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """The adapter's parameters that act behind the stream after `layer` layers, output's too."""
    return [p for name, p in get_adapter_params(model).items() if _number(name) > layer]


def check_freeze(cfg: DictConfig, origin: Origin, model: nn.Module) -> None:
    """Check the key `freeze_after` against the model.

    Raises:
        UserError: It leaves no layer to train, or freezes none.
    """
    depth = len(model.layers)  # type: ignore[arg-type]
    if cfg.freeze_after is not None and not 1 <= cfg.freeze_after < depth:
        raise UserError(
            f"{origin.at('freeze_after')}: must be from 1 to {depth - 1}, as the model has {depth} "
            "layers"
        )


def freeze_after(model: nn.Module, layer: int, *, first_process: bool) -> None:
    """Train no adapter behind `layer` layers, and say what is left.

    These parameters get no gradient, so no optimizer changes them, by weight decay neither. They
    are saved as the others are: a new adapter's with B = 0, which adds nothing.

    Args:
        model: With its adapter initialised; may be sharded by FSDP2, not yet run.
        layer: From 1.
        first_process: Whether this process says it.
    """
    frozen = adapter_behind(model, layer)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if first_process:
        total = sum(p.numel() for p in get_adapter_params(model).values())
        trained = total - sum(p.numel() for p in frozen)
        log.info(
            f"freeze_after: {trained:,} of the adapter's {total:,} parameters are trained, those "
            f"of the first {layer} layers"
        )


def _number(name: str) -> float:
    """Of the layer that a parameter belongs to, from 1; what is in no layer comes last."""
    found = re.match(r"layers\.(\d+)\.", plain_name(name))
    return int(found[1]) + 1 if found else float("inf")
