"""A step's loss: at most two forwards a micro-batch, each term divided by its own count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import disable_adapter

from emarecipes.defenses import Defense
from emarecipes.training.batch import Batch
from emarecipes.training.loss_head import LossHead, Request, Term, cross_entropy


class TrainingLoss:
    """Cross entropy plus the defenses' terms of one model.

        loss = CE + sum_k weight_k * (sum of term k) / (count of term k)

    where sums and counts run over all micro-batches and processes of a step.

    Args:
        model: torchtune's decoder with LoRA; its `unembed` is replaced by the loss head.
        defenses: By the name under which each is logged.
        forward_context: Wraps the policy's forward (torchtune's activation offloading).
        chunk_elements: See `LossHead`.
    """

    def __init__(
        self,
        model: Any,
        defenses: Mapping[str, Defense],
        forward_context: AbstractContextManager[Any] | None = None,
        chunk_elements: int | None = None,
    ) -> None:
        self._model = model
        # In order of name, so that the order in the config does not change a rounding.
        self._defenses = dict(sorted(defenses.items()))
        self._on_logits = {n: d for n, d in self._defenses.items() if d.has("logit_term")}
        self._on_hidden = {n: d for n, d in self._defenses.items() if d.has("hidden_term")}
        self._needs_reference = any(
            d.needs_reference for d in (*self._on_logits.values(), *self._on_hidden.values())
        )
        self._layers = sorted({i for d in self._on_hidden.values() for i in d.hidden_layers})
        self._forward_context = forward_context or nullcontext()
        self.head = LossHead(model, chunk_elements)
        model.output_hidden_states = [i for i in self._layers if i < len(model.layers)]

    @property
    def names(self) -> list[str]:
        """The terms in the order of counts and sums: `ce`, then defenses by name."""
        return ["ce", *self._on_logits, *self._on_hidden]

    @property
    def weights(self) -> list[float]:
        """Each term's factor in the loss, in the order of `names`."""
        return [1.0, *(self._defenses[name].weight for name in self.names[1:])]

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """How many items each term sums over, shape (len(names),), float64, on the CPU."""
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for batch in batches:
            total[0] += batch.labelled_BS.sum()
            for index, name in enumerate(self.names[1:], start=1):
                total[index] += self._defenses[name].count(batch).cpu()
        return total

    def backward(self, batch: Batch, counts: Tensor, gradient_scale: float = 1.0) -> Tensor:
        """Forward and backward of one micro-batch; gradients are added to the parameters'.

        Args:
            batch: On the model's device.
            counts: Of the whole step: all micro-batches, all processes.
            gradient_scale: Multiplies the gradient; FSDP2 averages over processes, which the world
                size undoes.

        Returns:
            Each term's sum over this micro-batch, unweighted, shape (len(names),), float64.
        """
        scales = [
            weight / max(count, 1.0)
            for weight, count in zip(self.weights, counts.tolist(), strict=True)
        ]
        request = Request(self._logit_terms(batch, scales), batch.targets_BS)
        reference_hidden = None
        if self._needs_reference:
            request.reference_TD, reference_hidden = self._reference(batch, request)
        with self._forward_context, self.head.computing(request):
            loss, hidden = self._forward(batch)
        sums = list(request.sums)
        for name, scale in zip(self._on_hidden, scales[len(sums) :], strict=True):
            defense = self._defenses[name]
            reference = reference_hidden if defense.needs_reference else None
            value = defense.hidden_term(
                {i: hidden[i] for i in defense.hidden_layers},
                None if reference is None else {i: reference[i] for i in defense.hidden_layers},
                batch,
            )
            loss = loss + scale * value.float()
            sums.append(value.detach().double())
        (loss * gradient_scale).backward()
        return torch.stack(sums)

    def _logit_terms(self, batch: Batch, scales: Sequence[float]) -> list[Term]:
        terms = [Term("ce", cross_entropy, batch.labelled_BS, scales[0])]
        for (name, defense), scale in zip(self._on_logits.items(), scales[1:], strict=False):
            compute = partial(_without_targets, defense)
            terms.append(
                Term(name, compute, defense.positions(batch), scale, defense.needs_reference)
            )
        return terms

    @torch.no_grad()
    def _reference(self, batch: Batch, request: Request) -> tuple[Tensor, dict[int, Tensor]]:
        """The adapter-off model's states: before the output layer, and at the layers read."""
        was_training = self._model.training
        self._model.eval()  # The reference has no dropout.
        try:
            with disable_adapter(self._model), self.head.computing(request, reference_only=True):
                return self._forward(batch)
        finally:
            self._model.train(was_training)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        output = self._model(**batch.inputs)
        *hidden, last = output if isinstance(output, list) else [output]
        by_layer = dict(zip(self._model.output_hidden_states, hidden, strict=True))
        depth = len(self._model.layers)
        if depth in self._layers:
            assert self.head.last_hidden_BSD is not None
            by_layer[depth] = self.head.last_hidden_BSD
        self.head.last_hidden_BSD = None
        return last, by_layer


def _without_targets(
    defense: Defense, policy_TV: Tensor, reference_TV: Tensor | None, targets_T: Tensor
) -> Tensor:
    return defense.logit_term(policy_TV, reference_TV)


def check_hidden_layers(defenses: Mapping[str, Defense], model: nn.Module) -> None:
    """Check that the layers which defenses read exist.

    Raises:
        ValueError: With the name of the defense.
    """
    depth = len(model.layers)  # type: ignore[arg-type]
    for name, defense in defenses.items():
        for layer in defense.hidden_layers:
            if not 0 <= layer <= depth:
                raise ValueError(f"{name}: layer {layer} is not in 0..{depth}")
