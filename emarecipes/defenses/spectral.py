"""Spectral penalty: the update's singular values stay even, so no single direction rules it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import AdaptedModule

# Squares lose half of the digits, so that 1e-8 of the largest singular value can be rounding.
_EXACT, _ROUNDING = torch.float64, 1e-6


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

    B A is never formed: with S^T S = B^T B and T^T T = A A^T its singular values are those of the
    r x r matrix M = S T^T. In float64, as squares lose half of the digits. With M = U diag(s) V^T,
    F = |M|_F and N = |M|_*, for the s above 1e-6 s_1

        d term / d B = B T^T V diag(c) V^T T        with c = (1 - F^2 / (N s)) / (F N)
        d term / d A = S^T U diag(c) U^T S A

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
        a_RI, b_OR = module.a_RI.detach().to(_EXACT), module.b_OR.detach().to(_EXACT)
        found = _spectrum(a_RI, b_OR)
        if found is None:
            return (module.a_RI.sum() + module.b_OR.sum()) * math.nan  # The run says so.
        if not any(found.values):
            return None
        squares, nuclear = sum(value**2 for value in found.values), sum(found.values)
        # Written so that all is 0 at rank 1, where the term is 1 whatever B A is.
        shares = [1 - squares / (nuclear * value) for value in found.kept]
        share_K = found.s_RR.new_tensor(shares) / (math.sqrt(squares) * nuclear)
        from_s_KR, from_t_KR = found.u_RK.T @ found.s_RR, found.vh_KR @ found.t_RR
        by_a = ((from_s_KR.T * share_K) @ from_s_KR @ a_RI).to(module.a_RI.dtype)
        by_b = (b_OR @ ((from_t_KR.T * share_K) @ from_t_KR)).to(module.b_OR.dtype)
        self._measured.append(_evenness(found))
        value = by_a.new_tensor(math.sqrt(squares) / nuclear)
        term: Tensor = _Known.apply(module.a_RI, module.b_OR, value, by_a, by_b)
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
    found = _spectrum(a_RI.to(_EXACT), b_OR.to(_EXACT))
    return None if found is None or not any(found.values) else _evenness(found)


@dataclass(frozen=True)
class _Spectrum:
    """Of B A: its singular values; those K above rounding, their U and V^T of M; the roots S, T."""

    values: list[float]
    kept: list[float]
    u_RK: Tensor
    vh_KR: Tensor
    s_RR: Tensor
    t_RR: Tensor


def _spectrum(a_RI: Tensor, b_OR: Tensor) -> _Spectrum | None:
    """Of matrices in float64; None where A or B is not finite."""
    grams_2RR = torch.stack([b_OR.T @ b_OR, a_RI @ a_RI.T])
    if not math.isfinite(grams_2RR.sum()):
        return None
    s_RR, t_RR = _roots(grams_2RR)
    u_RR, singular_R, vh_RR = torch.linalg.svd(s_RR @ t_RR.T)
    values: list[float] = singular_R.tolist()
    kept = [value for value in values if value > _ROUNDING * values[0]]
    return _Spectrum(values, kept, u_RR[:, : len(kept)], vh_RR[: len(kept)], s_RR, t_RR)


def _roots(grams_NRR: Tensor) -> Tensor:
    """X with X^T X = G of each G, which is positive semidefinite."""
    lower_NRR, failed_N = torch.linalg.cholesky_ex(grams_NRR)
    if failed_N.any():  # Of lower rank.
        values_NR, vectors_NRR = torch.linalg.eigh(grams_NRR)
        lower_NRR = vectors_NRR * values_NR.clamp(min=0).sqrt().unsqueeze(-2)
    roots_NRR: Tensor = lower_NRR.mT
    return roots_NRR


def _evenness(found: _Spectrum) -> tuple[float, float]:
    total = sum(found.values)
    shares = [value / total for value in found.kept]
    entropy = -sum(share * math.log(share) for share in shares)
    return sum((value / found.values[0]) ** 2 for value in found.values), entropy


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
