"""Terms on the adapter's matrices alone: one layer at a time, whole, once a step; and figures.

Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from emarecipes.defenses import AdaptedModule, Defense
from emarecipes.defenses.spectral import evenness
from emarecipes.errors import UserCodeError
from emarecipes.models.adapters.layout import plain_module
from emarecipes.models.adapters.read import module_scale
from emarecipes.models.loss_head import check_gradient


class WeightTerms:
    """Computes `weight_term` of some defenses and adds its gradient to the adapter's.

    Every process computes every term from the same whole matrices, and keeps its own shard of the
    gradient: at most one layer's matrices are held whole beside the shards, and of each term's
    gradient one float32 copy of this process's shards while its layers are counted.

    Args:
        model: With LoRA; may be sharded by FSDP2, on the CPU too.
        defenses: Those with a `weight_term`, by name.
    """

    def __init__(self, model: nn.Module, defenses: Mapping[str, Defense]) -> None:
        self._model = model
        self._defenses = dict(defenses)

    def backward(self, factors: Mapping[str, float]) -> dict[str, float | None]:
        """Add the gradient of factor * term of each named defense to the parameters'.

        Returns:
            Each term's value; None where no layer has one.

        Raises:
            UserCodeError: `weight_term` returned no scalar, or one without gradient.
        """
        named = {name: self._defenses[name] for name in self._defenses if name in factors}
        if not named:
            return {}
        found: dict[str, list[float]] = {name: [] for name in named}
        gradients: dict[str, list[tuple[nn.Parameter, Tensor]]] = {name: [] for name in named}
        for layer, (a, b), scale in adapted_layers(self._model):
            whole = [_whole(parameter) for parameter in (a, b)]
            for name, defense in named.items():
                matrices = [tensor.detach().requires_grad_() for tensor in whole]
                value = defense.weight_term(AdaptedModule(layer, matrices[0], matrices[1], scale))
                if value is None:
                    continue
                _check(name, value, factors[name])
                found[name].append(float(value.detach()))
                if factors[name] and value.requires_grad:
                    taken = torch.autograd.grad(value, matrices, allow_unused=True)
                    gradients[name] += [
                        (parameter, _shard_like(parameter, gradient))
                        for parameter, gradient in zip((a, b), taken, strict=True)
                        if gradient is not None
                    ]
        values: dict[str, float | None] = {}
        for name, defense in named.items():
            count = len(found[name])
            divisor = max(count, 1) if defense.module_reduction == "mean" else 1
            for parameter, gradient in gradients[name]:
                _add(parameter, gradient * (factors[name] / divisor))
            values[name] = sum(found[name]) / divisor if count else None
        return values


def adapted_layers(
    model: nn.Module,
) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Parameter], float]]:
    """Every adapted layer's plain name, its A (R, I) and B (O, R), and lora_alpha / lora_rank."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_params"):
            layer: Any = module
            plain = plain_module(f"{name}.lora_a.weight")
            matrices = (layer.lora_a.weight, layer.lora_b.weight)
            yield plain, matrices, module_scale(layer)


@torch.no_grad()
def update_evenness(model: nn.Module) -> dict[str, float]:
    """`update_stable_rank` and `update_entropy` of the adapter, for the log of any run.

    Means over the layers whose update is not 0, see `SpectralPenalty`; empty where there is none.
    Every process must call it: under FSDP2 one layer's matrices are gathered at a time.
    """
    found = [evenness(_whole(a), _whole(b)) for _, (a, b), _ in adapted_layers(model)]
    there = [both for both in found if both is not None]
    if not there:
        return {}
    ranks, entropies = zip(*there, strict=True)
    return {"update_stable_rank": fmean(ranks), "update_entropy": fmean(entropies)}


def _check(name: str, value: Any, factor: float) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise UserCodeError(
            f"defenses.{name}: weight_term must return a scalar tensor or None, not {what}"
        )
    check_gradient(name, "weight_term", value, factor)


def _whole(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        # Offloaded shards are gathered on the device.
        tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
    return tensor.float()


def _shard_like(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """A whole gradient, the same on every process, sharded as its parameter is."""
    if not isinstance(parameter, DTensor):
        return gradient
    mesh = parameter.device_mesh
    whole = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:  # Frozen (`freeze_after`): an optimizer would move it.
        return
    gradient = gradient.to(parameter.device, parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
