"""What a defense is told of its run and of the adapter.

Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emarecipes.models.source import ModelSource


@dataclass(frozen=True)
class TrainingContext:
    """What a defense may know of the run it is set up in."""

    device: torch.device
    dtype: torch.dtype
    total_steps: int
    output_dir: Path
    source: ModelSource
    first_process: bool


@dataclass(frozen=True)
class AdaptedModule:
    """The matrices of one adapted layer, whole and in float32: it adds scale * B A to its weight.

    Attributes:
        name: The layer's in torchtune, for example "layers.0.attn.q_proj".
        a_RI, b_OR: A and B.
        scale: `lora_alpha` / `lora_rank`.
    """

    name: str
    a_RI: Tensor
    b_OR: Tensor
    scale: float
