"""The adapter's first values: drawn, or those of a trained adapter that the run goes on from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, get_adapter_params

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.models._torchtune import assign_whole, plain_name
from emarecipes.models.adapters.layout import plain_module
from emarecipes.models.adapters.read import LoadedLayer, read_adapter

if TYPE_CHECKING:
    from emarecipes.defenses import ModelSource


def read_initial_adapter(
    cfg: DictConfig, origin: Origin, source: ModelSource
) -> dict[str, LoadedLayer]:
    """The adapter that `init_adapter` names, by torchtune's module names; empty without one.

    Raises:
        UserError: It does not belong on the model; it is LoRA and the model DoRA.
    """
    if cfg.init_adapter is None:
        return {}
    where = origin.at("init_adapter")
    try:
        layers = read_adapter(source.meta_model, Path(cfg.init_adapter), source)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    is_dora = any(isinstance(module, DoRALinear) for module in source.meta_model.modules())
    if is_dora and any(layer.magnitude is None for layer in layers.values()):
        raise UserError(f"{where}: {cfg.init_adapter} is LoRA; set model.use_dora: false")
    return layers


def initialize_adapter(
    model: nn.Module,
    seed: int,
    trained: Mapping[str, LoadedLayer] | None = None,
    scale: float = 1.0,
) -> None:
    """Set every LoRA A to torchtune's own distribution; B stays zero, DoRA's magnitude as it is.

    A is uniform in +-1/sqrt(d_in) (Kaiming uniform with a = sqrt(5), as in LoRA's first
    implementation). torchtune draws it in module order from the process's generator, so that one
    device and two, or another set of adapted layers, start elsewhere at one seed; here each matrix
    has a generator of its own.

    Where a trained adapter is given, its layers take the place of that: B times its own scale over
    the model's. Ranks that the model has beyond the adapter's, and modules that it lacks, are drawn
    as ever, without effect at first.

    Args:
        model: With LoRA or DoRA modules; may be sharded by FSDP2.
        seed: The run's seed.
        trained: From `read_initial_adapter`. Every process must have it.
        scale: The model's alpha / rank.
    """
    for name, parameter in get_adapter_params(model).items():
        layer = (trained or {}).get(plain_module(name))
        if name.endswith("lora_a.weight"):
            value = _draw(parameter.shape, seed, plain_name(name))
            if layer is not None:
                value[: len(layer.a)] = layer.a
        elif layer is None:
            continue
        elif name.endswith("lora_b.weight"):
            value = torch.zeros(parameter.shape)
            value[:, : len(layer.a)] = layer.b.float() * (layer.scale / scale)
        else:
            assert layer.magnitude is not None
            value = layer.magnitude
        assign_whole(parameter, value)


def _draw(shape: torch.Size, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
