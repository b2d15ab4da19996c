"""Spectral penalty: the update's singular values stay even, so no single direction rules it."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import AdaptedModule


class SpectralPenalty(Defense):
    r"""Frobenius norm over nuclear norm of the update, averaged over adapted layers.

    With s_1 >= s_2 >= ... the singular values of a layer's update B A, at most r of them,

        term = mean over layers of  |B A|_F / |B A|_* = sqrt(sum_i s_i^2) / sum_i s_i

    from 1 / sqrt(r), where all r are equal, to 1, where there is one. A factor of the update, such
    as `lora_alpha`'s, changes nothing. A layer whose B is 0, as all are before the first step, is
    left out; where all are, the term is not logged.

    Logged too, means over layers: `<name>_stable_rank` = |B A|_F^2 / s_1^2, and `<name>_entropy` =
    -sum_i p_i log p_i with p_i = s_i / sum_j s_j, in nats. Every run logs both after each epoch, as
    `update_stable_rank` and `update_entropy`; `weight: 0` logs them in every step.

    B A is never formed: with B = Q S and A^T = P T its singular values are those of the r x r
    matrix M = S T^T. All in float32. With M = U diag(s) V^T, over the s_i above s_1 max(O, I) eps,

        d term / d (B A) = Q (M / (F N) - (F / N^2) U V^T) P^T,  F = |M|_F, N = |M|_*

    Source: arXiv 2606.31591. No weight has been published. With DoRA the term is of B A alone, not
    of the magnitudes.

    Args:
        weight: Factor in the loss.
        every_n_batches: k: in one step of every k, see `KLToReference`.

    Raises:
        UserError: For a negative weight, or `every_n_batches` less than 1.
    """

    def __init__(self, weight: float = 1.0, every_n_batches: int = 1) -> None:
        super().__init__(weight, every_n_batches=every_n_batches)
        self._measured: list[tuple[float, float]] = []

    def weight_term(self, module: AdaptedModule) -> Tensor | None:
        """The layer's |B A|_F / |B A|_*, None where B A is 0."""
        a_RI, b_OR = module.a_RI, module.b_OR
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            return (a_RI.sum() + b_OR.sum()) * math.nan  # The run says so, with the step.
        with torch.no_grad():
            q, s = torch.linalg.qr(b_OR)
            p, t = torch.linalg.qr(a_RI.T)
            m = s @ t.T
            u, singular, vh = torch.linalg.svd(m, full_matrices=False)
            values: list[float] = singular.tolist()
            if not any(values):
                return None
            kept = _above_rounding(values, a_RI, b_OR)
            frobenius, nuclear = math.sqrt(sum(value**2 for value in values)), sum(values)
            # Grouped so that it is 0 at rank 1, where the term is 1 whatever B A is.
            inner = (m / frobenius - (frobenius / nuclear) * (u[:, :kept] @ vh[:kept])) / nuclear
            # The gradient by B A, times A^T and B^T.
            gradients = (s.T @ inner) @ p.T, q @ (inner @ t)
        self._measured.append(_evenness(values, kept))
        term: Tensor = _Known.apply(a_RI, b_OR, m.new_tensor(frobenius / nuclear), *gradients)
        return term

    def figures(self) -> dict[str, float]:
        """Stable rank and entropy of the singular values before the step's update."""
        measured, self._measured = self._measured, []
        if not measured:
            return {}
        ranks, entropies = zip(*measured, strict=True)
        return {"stable_rank": fmean(ranks), "entropy": fmean(entropies)}


def evenness(a_RI: Tensor, b_OR: Tensor) -> tuple[float, float] | None:
    """Stable rank and entropy of a layer's update B A; None where it is 0 or not finite.

    See `SpectralPenalty` for both.
    """
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        return None
    s, t = torch.linalg.qr(b_OR, mode="r")[1], torch.linalg.qr(a_RI.T, mode="r")[1]
    values: list[float] = torch.linalg.svdvals(s @ t.T).tolist()
    return _evenness(values, _above_rounding(values, a_RI, b_OR)) if any(values) else None


def _evenness(values: list[float], kept: int) -> tuple[float, float]:
    total = sum(values)
    shares = [value / total for value in values[:kept]]
    entropy = -sum(share * math.log(share) for share in shares)
    return sum((value / values[0]) ** 2 for value in values), entropy


def _above_rounding(values: list[float], a_RI: Tensor, b_OR: Tensor) -> int:
    """How many of the singular values, the largest first, are more than rounding."""
    least = values[0] * max(len(b_OR), a_RI.shape[1]) * torch.finfo(a_RI.dtype).eps
    return sum(value > least for value in values)


class _Known(torch.autograd.Function):
    """A value that was computed with its gradients by A and B."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, value: Tensor, by_a: Tensor, by_b: Tensor
    ) -> Tensor:
        ctx.save_for_backward(by_a, by_b)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        by_a, by_b = ctx.saved_tensors
        return gradients[0] * by_a, gradients[0] * by_b, None, None, None
