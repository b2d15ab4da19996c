"""A step's gradient, with that of single terms apart: to change it, clip it, compare or blame."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune import utils

from emarecipes.defenses import Defense
from emarecipes.models.batch import Batch
from emarecipes.training.random_state import kept_random_state
from emarecipes.training.step import TrainingLoss

log = utils.get_logger("INFO")

Pairs = list[tuple[nn.Parameter, Tensor]]

# The step whose gradients are compared first. A shorter run's are in its last step, from this one
# on: in the first two a warm-up from a rate of 0 leaves the adapter, and so many a term, at 0.
FIRST_RATIO, SHORTEST_RUN = 10, 3


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
        self._apart: dict[str, Pairs] = {}

    def backward(
        self, batches: Sequence[Batch], counts: Tensor, defenses: Mapping[str, Defense]
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of all terms, for the parameters; where a defense asks, some terms' apart.

        A term's gradient that is apart is of a forward and backward over its rows alone.

        Returns:
            Each micro-batch's sums, as `TrainingLoss.backward` gives them, on the CPU; and those of
            `TrainingLoss.backward_weights`.
        """
        groups = self._groups(counts, defenses)
        taken = {name for names in groups.values() for name in names}
        rest = [n for n in self._loss.present if n not in taken] if groups else None
        found = []
        for key, names in groups.items():
            source = defenses[key].samples if key in defenses else "all"
            found.append(self._backward([b.rows_of(source) for b in batches], counts, names))
            trained = [p for p in self._model.parameters() if p.requires_grad]
            self._apart[key] = [
                (p, torch.zeros_like(p) if p.grad is None else p.grad) for p in trained
            ]
            self._model.zero_grad(set_to_none=True)
        found.append(self._backward(batches, counts, rest))
        for pairs in self._apart.values():
            for parameter, gradient in pairs:
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad += gradient
        by_batch = zip(*(sums for sums, _ in found), strict=True)
        sums = [torch.stack(of_one).sum(dim=0) for of_one in by_batch]
        return sums, torch.stack([once for _, once in found]).sum(dim=0)

    def before_update(self, step: int, defenses: Mapping[str, Defense]) -> None:
        """Have the defenses change the gradient that `backward` left."""
        for name, defense in defenses.items():
            if defense.has("before_update"):
                keys = {asked: self._key(name, asked) for asked in defense.apart}
                apart = {a: self._apart[key] for a, key in keys.items() if key in self._apart}
                defense.before_update(self._model, step, apart)
        self._apart.clear()

    def _groups(self, counts: Tensor, defenses: Mapping[str, Defense]) -> dict[str, list[str]]:
        """What is apart in this step: the names of its terms, by "ce" or a defense's name."""
        acting = {
            name
            for name, count, weight in zip(
                self._loss.names, counts.tolist(), self._loss.weights, strict=True
            )
            if count > 0 and weight > 0 and name in self._loss.present
        }
        asked = {self._key(name, asked) for name, d in defenses.items() for asked in d.apart}
        groups = {}
        for key in sorted(asked):
            names = self._loss.objective if key == "ce" else (key,)
            if acting.intersection(names):
                groups[key] = list(names)
        return groups

    def _key(self, name: str, asked: str) -> str:
        """One key for one gradient, whatever a defense of that name calls it."""
        key = name if asked == "own" else asked
        return "ce" if key in self._loss.objective else key

    def _backward(
        self, batches: Sequence[Batch], counts: Tensor, only: Sequence[str] | None
    ) -> tuple[list[Tensor], Tensor]:
        sums = [
            self._loss.backward(b, counts, gradient_scale=self._world_size, only=only).cpu()
            for b in batches
        ]
        return sums, self._loss.backward_weights(only=only)

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
            self._backward(batches, counts, terms)
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
        *,
        last: bool = False,
    ) -> dict[str, float]:
        """Norm of each due term's gradient over cross entropy's (or that of what replaces it).

        Of the whole step, however it is split. Warns of a term that has a weight, acts in this
        step, and has no gradient in it.

        Args:
            step: From 1.
            batches: This process's micro-batches of the step.
            counts: Of the whole step.
            defenses: By name.
            logged: Names of the figures that the run has logged before.
            last: Whether it ends with this step.
        """
        due = [
            name
            for name, count in zip(self._loss.names, counts.tolist(), strict=True)
            if name in defenses
            and name in self._loss.present
            and name not in self._loss.objective
            and count > 0
            and _due(defenses[name], step, f"{name}_gradient_ratio" not in logged, last)
        ]
        if not due:
            return {}
        cross_entropy = self.norm_of(self._loss.objective, batches, counts)
        norms = {name: self.norm_of([name], batches, counts) for name in due}
        for name, norm in norms.items():
            if not norm and defenses[name].weight:
                utils.log_rank_zero(
                    log,
                    f"step {step}: the gradient of defenses.{name} is 0: with these settings, in "
                    "this step, it does not act on the adapter",
                    level=logging.WARNING,
                )
        # Nothing to compare with: cross entropy of weight 0 on every row of the step.
        return {f"{n}_gradient_ratio": v / cross_entropy for n, v in norms.items() if cross_entropy}


def _due(defense: Defense, step: int, first: bool, last: bool) -> bool:
    """Whether the ratio is due in this step, or in one of its block that the term is not in.

    Args:
        defense: The term's.
        step: From 1.
        first: Whether its ratio was never logged.
        last: Whether the run ends with this step.
    """
    from_step = SHORTEST_RUN if last else FIRST_RATIO
    if first and defense.weight and step >= from_step:
        return True
    ratio_every, every = defense.gradient_ratio_every, defense.every_n_batches
    before = (step - 1) // every * every
    block = range(before + 1, before + every + 1)
    return ratio_every > 0 and any(s % ratio_every == FIRST_RATIO % ratio_every for s in block)
