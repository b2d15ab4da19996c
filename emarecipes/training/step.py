"""A step's loss: at most two forwards a micro-batch, each term divided by its own count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emarecipes.defenses import Defense
from emarecipes.models._torchtune import as_reference
from emarecipes.models.batch import Batch
from emarecipes.models.loss_head import LossHead, check_gradient
from emarecipes.models.loss_terms import Request
from emarecipes.training.logit_terms import LogitTerms, labelled
from emarecipes.training.reference_cache import (
    ReferenceCache,
    States,
    reads_at_targets,
    reference_depth,
)
from emarecipes.training.step_terms import StepTerms
from emarecipes.training.weight_terms import WeightTerms


class TrainingLoss:
    """Cross entropy plus the defenses' terms of one model.

        loss = CE + sum_k weight_k * (sum of term k) / (count of term k)
        CE   = sum_s w_s (sum of source s) / sum_s w_s (count of source s)

    where sums and counts run over all micro-batches and processes of a step, and the sources s are
    one, or "task" and "safe" where safe rows are interleaved; w_task = 1. A term with
    `every_n_batches: n` is in one step of every n, with n times its weight. A defense may take CE's
    place; then CE is only measured (see `Defense`). `WeightTerms` and `StepTerms` come once a step.

    Args:
        model: torchtune's decoder with LoRA; its `unembed` is replaced by the loss head.
        defenses: By the name under which each is logged.
        safe_ce_weight: w_safe, where rows are of two sources; None where they are of one.
        forward_context: Wraps the policy's forward (torchtune's activation offloading).
        chunk_elements: See `LossHead`.
        compiled: See `LossHead`.
        reference_cache: Where the reference's states are kept, else they are computed every time.
        seed: Draws the steps of the terms with `every_n_batches`.
    """

    def __init__(
        self,
        model: Any,
        defenses: Mapping[str, Defense],
        safe_ce_weight: float | None = None,
        forward_context: AbstractContextManager[Any] | None = None,
        chunk_elements: int | None = None,
        reference_cache: ReferenceCache | None = None,
        seed: int = 0,
        *,
        compiled: bool = False,
    ) -> None:
        self._model = model
        self._seed = seed
        self._reference_cache = reference_cache
        # In order of name, so that the order in the config does not change a rounding.
        self._defenses = dict(sorted(defenses.items()))
        self._ce_weights = (
            {"ce": 1.0} if safe_ce_weight is None else {"ce_task": 1.0, "ce_safe": safe_ce_weight}
        )
        self._logit_terms = LogitTerms(self._defenses, self._ce_weights)
        self._on_logits = self._logit_terms.defenses
        self._on_hidden = {n: d for n, d in self._defenses.items() if d.has("hidden_term")}
        on_weights = {n: d for n, d in self._defenses.items() if d.has("weight_term")}
        self._once = on_weights | {n: d for n, d in self._defenses.items() if d.has("step_term")}
        self._on_reference = {name for name, d in self._terms() if d.needs_reference}
        self._layers = sorted({i for d in self._on_hidden.values() for i in d.hidden_layers})
        self._reference_depth = reference_depth(self._defenses.values(), len(model.layers))
        self._forward_context = forward_context or nullcontext()
        self.head = LossHead(model, chunk_elements, compiled=compiled)
        self._weight_terms = WeightTerms(model, on_weights)
        self._step_terms = StepTerms(model, self.head, self._defenses, compiled=compiled)
        model.output_hidden_states = [i for i in self._layers if i < len(model.layers)]
        self.begin_step(1)

    def begin_step(self, step: int) -> None:
        """Say which step comes, from 1: terms with `every_n_batches` are in some steps only."""
        self._step_terms.begin_step()
        self.present = [
            *self._ce_weights,
            *(n for n, d in self._terms() if _takes_part(d.every_n_batches, step, self._seed)),
        ]

    @property
    def names(self) -> list[str]:
        """The terms in the order of counts and sums: cross entropy's, then defenses by name."""
        return [*self._ce_weights, *(name for name, _ in self._terms())]

    @property
    def weights(self) -> list[float]:
        """Each term's weight, in the order of `names`; that of a cross entropy among its like."""
        replaced = self._logit_terms.replacing is not None
        ce = [0.0 if replaced else weight for weight in self._ce_weights.values()]
        return [*ce, *(d.weight for _, d in self._terms())]

    @property
    def objective(self) -> tuple[str, ...]:
        """What the rows are learned by: cross entropy's names, or of what replaces it."""
        replacing = self._logit_terms.replacing
        return tuple(self._ce_weights) if replacing is None else (replacing,)

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """How many items each term sums over, shape (len(names),), float64, on the CPU.

        A term that is there once a step counts once a process, which all give the same value.
        """
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for batch in batches:
            for index, name in enumerate(self._ce_weights):
                total[index] += labelled(batch, name).sum().cpu()
            for index, (name, defense) in enumerate(self._terms(), start=len(self._ce_weights)):
                if name in self.present and name in self._on_logits:
                    total[index] += self._logit_terms.count(name, batch).cpu()
                elif name in self.present and name in self._on_hidden:
                    total[index] += defense.count(batch).cpu()
        for name in self._once:
            total[self.names.index(name)] = float(name in self.present)
        return total

    def means(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        """The figures of a step, for the log: the loss, cross entropy, every term unweighted.

        What no row of the step is for (safe samples alone), or is not in this step, has no figure.

        Args:
            sums: From `backward` and `backward_weights`, over all micro-batches and processes.
            counts: From `counts`, likewise.
        """
        means = dict(zip(self.names, (sums / _divisors(counts)).tolist(), strict=True))
        kinds = len(self._ce_weights)
        scales = self._ce_scales(counts)
        ce = float((scales * sums[:kinds]).sum())
        loss = sum(d.weight * d.every_n_batches * means[name] for name, d in self._terms())
        loss += ce if self.objective[0] in self._ce_weights else 0.0
        counted = [n for n, c in zip(self.names, counts.tolist(), strict=True) if c > 0]
        present = {n: means[n] for n in counted if n in self.present and n != "ce"}
        of_some = {"ce": ce} if float((scales * counts[:kinds]).sum()) > 0 else {}
        return {"loss": loss} | of_some | present

    def backward(
        self,
        batch: Batch,
        counts: Tensor,
        gradient_scale: float = 1.0,
        only: Sequence[str] | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch; gradients are added to the parameters'.

        Args:
            batch: On the model's device.
            counts: Of the whole step: all micro-batches, all processes.
            gradient_scale: Multiplies the gradient; FSDP2 averages over processes, which the world
                size undoes.
            only: Names of the terms that are computed, of those in this step; by default all. The
                others' sums are 0.

        Returns:
            Each term's sum over this micro-batch, unweighted, shape (len(names),), float64.
        """
        scales = self._scales(counts)
        wanted = [n for n in self.present if only is None or n in only]
        if all(name in self._once for name in wanted):
            return torch.zeros(len(self.names), dtype=torch.float64)
        scales = [s if n in wanted else 0.0 for s, n in zip(scales, self.names, strict=True)]
        everywhere = request = self._request(batch, scales)
        if wanted != self.names:  # A factor of 0 would not silence a gradient that is not finite.
            nowhere_BS = torch.zeros_like(batch.labelled_BS)
            terms = [
                t if t.name in wanted else replace(t, positions_BS=nowhere_BS)
                for t in everywhere.terms
            ]
            request = replace(everywhere, terms=terms)
        reference_hidden = None
        if self._on_reference.intersection(wanted):
            reference_TD, reference_hidden = self._reference(batch, everywhere)
            if request is not everywhere:
                reference_TD = reference_TD[request.selected_BS[everywhere.selected_BS]]
            request.reference_TD = reference_TD
        with ExitStack() as acting:  # Over the backward too: checkpointed layers run again in it.
            once = self._step_terms.in_rows(batch, wanted)
            with once as of_rows, self._forward_context, self.head.computing(request):
                for defense in self._defenses.values():
                    acting.enter_context(defense.policy_forward(batch))
                loss, hidden = self._forward(batch)
            sums = list(request.sums)
            for name, scale in zip(self._on_hidden, scales[len(sums) :], strict=False):
                if name not in wanted:
                    sums.append(request.sums.new_zeros(()))
                    continue
                defense = self._defenses[name]
                reference = reference_hidden if defense.needs_reference else None
                value = defense.hidden_term(
                    {i: hidden[i] for i in defense.hidden_layers},
                    None if reference is None else {i: reference[i] for i in defense.hidden_layers},
                    batch,
                )
                check_gradient(name, "hidden_term", value, scale)
                loss = loss + scale * value.float()
                sums.append(value.detach().double())
            (loss * gradient_scale + of_rows()).backward()
        sums += [request.sums.new_zeros(()) for _ in self._once]
        return torch.stack(sums)

    def backward_weights(self, only: Sequence[str] | None = None) -> Tensor:
        """Once a step: the terms that are no micro-batch's, their gradients added to the others'.

        Args:
            only: As in `backward`.

        Returns:
            Each term's value, of other terms 0, shape (len(names),), float64, on the CPU.
        """
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        wanted = [n for n in self.present if only is None or n in only]
        factors = {n: d.weight * d.every_n_batches for n, d in self._once.items() if n in wanted}
        values = self._weight_terms.backward(factors) | self._step_terms.backward(factors)
        for name, value in values.items():
            if value is None:
                self.present.remove(name)  # In none of the adapter's layers: nothing to log.
            else:
                sums[self.names.index(name)] = value
        return sums

    def _terms(self) -> list[tuple[str, Defense]]:
        return [*self._on_logits.items(), *self._on_hidden.items(), *self._once.items()]

    def _scales(self, counts: Tensor) -> list[float]:
        """Each term's factor in the loss: its weight over what its sum is divided by."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        kinds = len(self._ce_weights)
        weights[kinds:] *= torch.tensor([float(d.every_n_batches) for _, d in self._terms()])
        scales = weights / _divisors(counts)
        scales[:kinds] = self._ce_scales(counts) if self.objective[0] in self._ce_weights else 0.0
        return scales.tolist()

    def _ce_scales(self, counts: Tensor) -> Tensor:
        """Each cross entropy's factor in their mean."""
        weights = torch.tensor(list(self._ce_weights.values()), dtype=torch.float64)
        total = float((weights * counts[: len(weights)]).sum())
        return weights / (total if total > 0 else 1.0)

    def _request(self, batch: Batch, scales: Sequence[float]) -> Request:
        terms = self._logit_terms.of(batch, scales)
        at_targets = reads_at_targets(self._defenses.values())
        return Request(terms, batch.next_BS, places_BS=batch.places_BS, at_targets=at_targets)

    def cache_reference(self, batch: Batch) -> None:
        """Store the reference's states of a micro-batch, of which every process has one."""
        self._reference(batch, self._request(batch, [0.0] * len(self.names)))

    def _reference(self, batch: Batch, request: Request) -> States:
        """The adapter-off model's states: before the output layer, and at the layers read."""
        if self._reference_cache is None:
            return self._reference_forward(batch, request)
        compute = partial(self._reference_forward, batch, request)
        return self._reference_cache.states(batch, request.selected_BS, compute)

    @torch.no_grad()
    def _reference_forward(self, batch: Batch, request: Request) -> States:
        computing = self.head.computing(request, reference_only=True)
        with as_reference(self._model, self._reference_depth), computing:
            return self._forward(batch)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        output = self._model(**batch.inputs)
        *hidden, last = output if isinstance(output, list) else [output]
        by_layer = dict(zip(self._model.output_hidden_states, hidden, strict=True))
        if (depth := len(self._model.layers)) in self._layers:
            assert self.head.last_hidden_BSD is not None
            by_layer[depth] = self.head.last_hidden_BSD
        self.head.last_hidden_BSD = None
        return last, by_layer


def _divisors(counts: Tensor) -> Tensor:
    """What each term's sum is divided by: 1 where it sums over nothing."""
    return torch.where(counts > 0, counts, 1.0)


def _takes_part(every: int, step: int, seed: int) -> bool:
    """Whether a term is in a step, from 1: in one of every block of steps, drawn for that block.

    Drawn anew, as a fixed distance could miss every step that is logged, or meet the same rows in
    every epoch. Terms with the same number are in the same steps and share the reference there.
    """
    block, place = divmod(step - 1, every)
    draws = np.random.Generator(np.random.PCG64([seed, block, every]))
    return place == int(draws.integers(every))
