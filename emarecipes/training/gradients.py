"""Norms of gradients: of all terms, to clip by; and of single terms, to compare or to blame."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import utils

from emarecipes.defenses import Defense
from emarecipes.models.batch import Batch
from emarecipes.training.random_state import kept_random_state
from emarecipes.training.step import TrainingLoss

log = utils.get_logger("INFO")

# The step whose gradients are compared first.
FIRST_RATIO = 10


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
            self._loss.backward_weights(only=terms)
        norm = self.clip(math.inf)
        self._model.zero_grad(set_to_none=True)
        return norm

    def ratios(
        self,
        step: int,
        batches: Sequence[Batch],
        counts: Tensor,
        defenses: Mapping[str, Defense],
        logged: Container[str],
    ) -> dict[str, float]:
        """Norm of each due term's gradient over cross entropy's (or that of what replaces it).

        Of the first micro-batch.

        Warns of a term that has a weight, acts in this step, and has no gradient in any of it.

        Args:
            step: From 1.
            batches: This process's micro-batches of the step.
            counts: Of the whole step.
            defenses: By name.
            logged: Names of the figures that the run has logged before.
        """
        due = [
            name
            for name, count in zip(self._loss.names, counts.tolist(), strict=True)
            if name in defenses
            and name in self._loss.present
            and name not in self._loss.objective
            and _due(defenses[name], step, count > 0 and f"{name}_gradient_ratio" not in logged)
        ]
        if not due:
            return {}
        cross_entropy = self.norm_of(self._loss.objective, batches[:1], counts)
        norms = {name: self.norm_of([name], batches[:1], counts) for name in due}
        for name, norm in norms.items():
            if not norm and defenses[name].weight and not self._acts(name, batches, counts):
                utils.log_rank_zero(
                    log,
                    f"step {step}: the gradient of defenses.{name} is 0: with these settings, in "
                    "this step, it does not act on the adapter",
                    level=logging.WARNING,
                )
        # Nothing to compare with: cross entropy of weight 0 on every row of this micro-batch.
        return {f"{n}_gradient_ratio": v / cross_entropy for n, v in norms.items() if cross_entropy}

    def _acts(self, name: str, batches: Sequence[Batch], counts: Tensor) -> bool:
        """Whether a term has a gradient in the step's other micro-batches, or no row for it."""
        index = self._loss.names.index(name)
        return not counts[index] or bool(self.norm_of([name], batches, counts))


def _due(defense: Defense, step: int, first: bool) -> bool:
    """Whether the ratio is due in this step, or in one of its block that the term is not in.

    Args:
        defense: The term's.
        step: From 1.
        first: Whether the term acts in this step, and its ratio was never logged.
    """
    if first and defense.weight and step >= FIRST_RATIO:
        return True
    ratio_every, every = defense.gradient_ratio_every, defense.every_n_batches
    before = (step - 1) // every * every
    block = range(before + 1, before + every + 1)
    return ratio_every > 0 and any(s % ratio_every == FIRST_RATIO % ratio_every for s in block)
