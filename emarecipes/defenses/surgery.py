"""Gradient surgery: what of the step would raise the KL on safe rows is taken out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from emarecipes.defenses.base import Samples, Tokens
from emarecipes.defenses.kl import Direction, KLToReference


class GradientSurgery(KLToReference):
    r"""KL to the reference on safe rows, whose gradient the rest of the step may not oppose.

    With g_a the gradient of that KL, a mean over tokens as `KLToReference`'s, and g_u that of
    everything else (cross entropy, other defenses' terms), each of all trained parameters as one
    vector and over all micro-batches and processes of the step,

        g_u <- g_u - (g_u . g_a / |g_a|^2) g_a    where g_u . g_a < 0
        gradient = g_u + weight * g_a

    to first order the step's g_u then leaves the KL on these rows as it is. The gradient is clipped
    afterwards. Without the projection this is `KLToReference` with `samples: safe` at the same
    weight, its control.

    Source: Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning" (SafeGrad), arXiv 2508.07172.
    Projected are raw gradients; Adam's step is along others.

    Args:
        weight: rho, the factor of g_a in the gradient and of the KL in the logged loss. Ours; which
            one was published is not known here. At 0 the KL is measured, and nothing projected.
        direction: Which divergence, see `KLToReference`.
        tokens: "response", or "all": the prompt's too.
        samples: Rows of the KL: "safe"; or "task" or "all".
        temperature: Divides both models' logits.

    Raises:
        UserError: For a negative weight, an unknown option or a temperature that is not positive.
    """

    apart = ("own",)

    def __init__(
        self,
        weight: float = 1.0,
        direction: Direction = "policy_to_reference",
        tokens: Tokens = "response",
        samples: Samples = "safe",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight, direction, tokens, samples, temperature)
        self._figures: dict[str, float] = {}

    def before_update(
        self,
        model: nn.Module,
        step: int,
        apart: Mapping[str, Sequence[tuple[nn.Parameter, Tensor]]],
    ) -> None:
        """Take the part of the gradient along -g_a out of it."""
        if "own" not in apart:
            return
        pairs = apart["own"]
        dot, square_u, square_a = _products(pairs)
        conflict = dot < 0 < square_a
        if conflict:
            for parameter, gradient in pairs:
                # Of the sum, as weight * g_a is to stay in it.
                assert parameter.grad is not None
                parameter.grad.sub_(gradient, alpha=dot / square_a)
        norms = {"user_norm": math.sqrt(square_u), "safe_norm": math.sqrt(square_a) / self.weight}
        self._figures = {"projected": float(conflict)} | norms
        if square_u and square_a:
            self._figures["cosine"] = dot / math.sqrt(square_u * square_a)

    def figures(self) -> dict[str, float]:
        """`cosine` of g_u and g_a, whether it was `projected` (0, 1), `user_norm`, `safe_norm`."""
        figures, self._figures = self._figures, {}
        return figures if all(map(math.isfinite, figures.values())) else {}


def _products(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> tuple[float, float, float]:
    """g_u . g_a, |g_u|^2 and |g_a|^2 of the whole vectors, in float64, the same on every process.

    Args:
        pairs: Parameters, whose gradient is g_u + g_a, and g_a.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    meshes = {parameter.device_mesh for parameter, _ in pairs if isinstance(parameter, DTensor)}
    for parameter, gradient in pairs:
        assert parameter.grad is not None and isinstance(parameter, DTensor) == bool(meshes)
        safe, whole = _local(gradient).double(), _local(parameter.grad).double()
        user = whole - safe
        products = [(user * safe).sum(), (user * user).sum(), (safe * safe).sum()]
        sums += torch.stack(products).cpu()
    for mesh in meshes:
        of_all = sums.to(mesh.device_type)
        torch.distributed.all_reduce(of_all, group=mesh.get_group())
        sums = of_all.cpu()
    dot, square_u, square_a = sums.tolist()
    return dot, square_u, square_a


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
