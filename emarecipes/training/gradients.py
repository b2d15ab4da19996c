"""Norms of gradients: of all terms, to clip by; and of single terms, to compare or to blame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from emarecipes.defenses import Defense
from emarecipes.training.batch import Batch
from emarecipes.training.random_state import kept_random_state
from emarecipes.training.step import TrainingLoss


class Gradients:
    """The gradient of a run's adapter. Every process must call every method.

    Args:
        model: With its adapter; may be sharded by FSDP2.
        loss: Its loss.
        world_size: Number of processes.
        device: The model's.
    """

    def __init__(
        self, model: Any, loss: TrainingLoss, world_size: int, device: torch.device
    ) -> None:
        self._model = model
        self._loss = loss
        self._world_size = world_size
        self._device = device

    def clip(self, max_norm: float) -> float:
        """Scale the gradient down to this norm; returns the norm that it had."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm=max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def norm_of(self, terms: Sequence[str], batches: Sequence[Batch], counts: Tensor) -> float:
        """Norm of some terms' gradient, by further forwards.

        Leaves no gradient behind, and the random numbers where they were: whether a run measures
        changes no dropout of it, and the terms that are compared see the same one.
        """
        self._model.zero_grad(set_to_none=True)
        with kept_random_state(self._device):
            for batch in batches:
                self._loss.backward(batch, counts, gradient_scale=self._world_size, only=terms)
        norm = self.clip(math.inf)
        self._model.zero_grad(set_to_none=True)
        return norm

    def ratios(
        self, step: int, batch: Batch, counts: Tensor, defenses: Mapping[str, Defense]
    ) -> dict[str, float]:
        """Norm of each due term's gradient over cross entropy's, on one micro-batch."""
        due = [n for n in self._loss.present if n in defenses and _due(defenses[n], step)]
        if not due:
            return {}
        cross_entropy = self.norm_of(("ce", "ce_task", "ce_safe"), [batch], counts)
        norms = {name: self.norm_of([name], [batch], counts) for name in due}
        # Nothing to compare with: cross entropy of weight 0 on every row of this micro-batch.
        return {f"{n}_gradient_ratio": v / cross_entropy for n, v in norms.items() if cross_entropy}


def _due(defense: Defense, step: int) -> bool:
    """Whether the ratio is due in this step, or in one of its block that the term is not in."""
    ratio_every, every = defense.gradient_ratio_every, defense.every_n_batches
    before = (step - 1) // every * every
    block = range(before + 1, before + every + 1)
    return ratio_every > 0 and any(s % ratio_every == 10 % ratio_every for s in block)
