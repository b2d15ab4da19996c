"""Holds an adapter in another precision than its base."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules.peft import DoRALinear, get_adapter_params


class CastLinear(nn.Linear):
    """y = x W^T with W rounded to the precision of x, its gradient in W's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute y of shape (..., out) for x of shape (..., in)."""
        return F.linear(x, self.weight.to(x.dtype))


class CastDoRALinear(DoRALinear):
    """torchtune's DoRA, the magnitude's product rounded to the precision of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute y of shape (..., out) for x of shape (..., in)."""
        rounded: Tensor = super().forward(x).to(x.dtype)
        return rounded


def hold_adapter_in(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert a model's adapter, in place; None leaves it as it is.

    Matrices held in fp32 over a bf16 base are rounded for each product, as under autocast: the
    product costs what it did, and the optimizer adds to the exact values. PEFT holds an adapter in
    fp32 too (`autocast_adapter_dtype`); it casts x up instead, which autocast, with which its
    trainers run, undoes.

    Call it after the base is loaded, `fix_dora_bias` and sharding, before the optimizer is built
    and before the first forward. Names and shapes of parameters stay the same.

    Args:
        model: With LoRA or DoRA modules; may be sharded by FSDP2, or on the meta device.
        dtype: The adapter's.
    """
    parameters = get_adapter_params(model)
    if dtype is None or all(p.dtype == dtype for p in parameters.values()):
        return
    for parameter in parameters.values():
        # A swap keeps the object, which FSDP2 and the recipe hold on to.
        converted = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, converted)
    for module in model.modules():
        if hasattr(module, "adapter_params"):
            module.lora_a.__class__ = module.lora_b.__class__ = CastLinear
            if type(module) is DoRALinear:
                module.__class__ = CastDoRALinear
