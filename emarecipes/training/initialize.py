"""The adapter's first values, as a function of the seed and each matrix's name alone."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from emarecipes._torchtune import assign_whole, plain_name


def initialize_adapter(model: nn.Module, seed: int) -> None:
    """Set every LoRA A to torchtune's own distribution; B stays zero, DoRA's magnitude as it is.

    A is uniform in +-1/sqrt(d_in) (Kaiming uniform with a = sqrt(5), as in LoRA's first
    implementation). torchtune draws it in module order from the process's generator, so that one
    device and two, or another set of adapted layers, start elsewhere at one seed; here each matrix
    has a generator of its own.

    Args:
        model: With LoRA or DoRA modules; may be sharded by FSDP2.
        seed: The run's seed.
    """
    for name, parameter in get_adapter_params(model).items():
        if name.endswith("lora_a.weight"):
            assign_whole(parameter, _draw(parameter.shape, seed, plain_name(name)))


def _draw(shape: torch.Size, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
