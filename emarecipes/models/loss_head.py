"""The loss head: from hidden states to the loss, without a (tokens x vocabulary) tensor.

It takes the place of `TransformerDecoder.unembed` and therefore runs inside the model's forward,
where FSDP2 has the output layer's weights whole. It keeps only the positions that some term asks
for, walks over them in chunks, and computes each chunk's logits, terms and gradients on the spot:
the output layer is used once a chunk and model, and nothing of a chunk outlives it.

Shapes: B batch, S sequence, T selected positions, C chunk of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import disable_adapter

from emarecipes.errors import UserCodeError
from emarecipes.models._torchtune import final_norm_and_cap, unsharded
from emarecipes.models.loss_terms import LogitTerm, Request, Term

# Logits of one chunk, in elements. Several float32 copies of a chunk live at once.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}


class LossHead:
    """Replaces `model.unembed`: logits as ever, or, inside `computing`, the loss.

    Args:
        model: torchtune's decoder, LoRA modules included; may be sharded later or already be.
        chunk_elements: Largest number of logits held at once; by default set by device.
        compiled: Compile what becomes of a chunk's logits (`torch.compile`): the softmaxes, the
            terms and their gradient in a few passes over the vocabulary instead of about twelve.
    """

    def __init__(
        self, model: Any, chunk_elements: int | None = None, *, compiled: bool = False
    ) -> None:
        self.model = model
        self._norm, self._cap = final_norm_and_cap(model)
        self._chunk_elements = chunk_elements
        self._request: Request | None = None
        self._reference_only = False
        self.term_values = torch.compile(term_values) if compiled else term_values
        self.last_hidden_BSD: Tensor | None = None
        model.unembed = self

    @contextmanager
    def computing(self, request: Request, *, reference_only: bool = False) -> Iterator[None]:
        """Within this context the model's forward returns the loss, a scalar.

        With `reference_only` it returns the normed hidden states at the selected positions, (T, D),
        to be put into `request.reference_TD` before the policy's forward.
        """
        self._request, self._reference_only = request, reference_only
        try:
            yield
        finally:
            self._request, self._reference_only = None, False

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        """The model's last step: (B, S, D) to logits (B, S, V), or as in `computing`."""
        self.last_hidden_BSD = hidden_BSD
        if self._request is None:
            return self.policy_logits(hidden_BSD).float()
        hidden_TD = hidden_BSD[self._request.selected_BS]
        if self._reference_only:
            normed_TD: Tensor = self._norm(hidden_TD)
            return self._at_targets(normed_TD) if self._request.at_targets else normed_TD
        trained = [p for p in _parameters(self.model.output) if p.requires_grad]
        loss: Tensor = _ChunkedLoss.apply(hidden_TD, self, self._request, *trained)
        return loss

    @torch.no_grad()
    def _at_targets(self, normed_TD: Tensor) -> Tensor:
        """The reference's log-probability of each selected position's target, float32 (T, 1)."""
        assert self._request is not None
        rows_T = self._request.targets_BS[self._request.selected_BS][:, None]
        found = [normed_TD.new_zeros(0, 1, dtype=torch.float32)]
        with unsharded(self.model.output):
            size = self.chunk_size(normed_TD.device)
            for states_CD, rows_C in zip(normed_TD.split(size), rows_T.split(size), strict=True):
                logits_CV = self.reference_logits(states_CD)
                found.append(_log_softmax(logits_CV).gather(1, rows_C))
        return torch.cat(found)

    def chunk_size(self, device: torch.device) -> int:
        """Positions a chunk holds."""
        budget = self._chunk_elements or CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
        return max(1, budget // int(self.model.tok_embeddings.num_embeddings))

    def policy_logits(self, hidden_TD: Tensor) -> Tensor:
        """Capped logits of states before the final norm, (T, V)."""
        return self.logits(self._norm(hidden_TD))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Capped logits of normed states, (T, V)."""
        output: Any = self.model.output
        # An nn.Module's own forward: FSDP2's hooks on a separately sharded output layer would
        # gather its weights again for every chunk.
        compute = output.forward if isinstance(output, nn.Module) else output
        logits: Tensor = compute(hidden_TD)
        if self._cap is not None:
            logits = self._cap * torch.tanh(logits.float() / self._cap)
        return logits

    def log_probabilities(self, hidden_TD: Tensor) -> Tensor:
        """log softmax of the logits, float32 (T, V)."""
        return torch.log_softmax(self.logits(hidden_TD), dim=-1, dtype=torch.float32)

    @torch.no_grad()
    def reference_logits(self, hidden_TD: Tensor) -> Tensor:
        """Capped logits with the output layer's own adapter, if it has one, off."""
        output: Any = self.model.output
        if not isinstance(output, nn.Module):
            return self.logits(hidden_TD)
        with disable_adapter(output):
            return self.logits(hidden_TD)


def term_values(
    policy_logits_CV: Tensor,
    reference_logits_CV: Tensor | None,
    targets_C: Tensor,
    terms: list[tuple[LogitTerm, bool, bool, Tensor | None]],
    places_C: Tensor | None = None,
    reference_C: Tensor | None = None,
) -> list[Tensor]:
    """Each term's values on a chunk.

    Args:
        policy_logits_CV: Of any floating type.
        reference_logits_CV: None where no term reads it.
        targets_C: Token ids.
        terms: Of each: its `compute`, whether it reads the reference, whether at the targets alone,
            and the rows it acts on, None for all.
        places_C: The targets' places in their answers, from 1.
        reference_C: The reference's log-probabilities of the targets, where they are known.
    """
    policy_CV = _log_softmax(policy_logits_CV)
    reference_CV = None
    if reference_logits_CV is not None:
        reference_CV = _log_softmax(reference_logits_CV)
    del policy_logits_CV, reference_logits_CV  # Nobody else has them: their memory is free.
    values = []
    for compute, needs_reference, at_targets, rows in terms:
        given_CV = reference_CV if needs_reference else None
        if needs_reference and at_targets:
            if reference_C is None:
                assert reference_CV is not None
                reference_C = reference_CV.gather(1, targets_C[:, None])[:, 0]
            given_CV = reference_C
        if rows is None:
            values.append(compute(policy_CV, given_CV, targets_C, places_C))
        else:
            given_CV = None if given_CV is None else given_CV[rows]
            places = None if places_C is None else places_C[rows]
            values.append(compute(policy_CV[rows], given_CV, targets_C[rows], places))
    return values


def _log_softmax(logits_CV: Tensor) -> Tensor:
    return torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)


def cross_entropy(
    policy_TV: Tensor,
    reference_TV: Tensor | None,
    targets_T: Tensor,
    places_T: Tensor | None = None,
) -> Tensor:
    """-log p(target) at each position, (T,)."""
    return -policy_TV.gather(1, targets_T[:, None])[:, 0]


def check_gradient(name: str, method: str, values: Tensor, scale: float) -> None:
    """Check that a term with a weight can change the model.

    Raises:
        UserCodeError: Its values carry no gradient (and are not all zero: it may have no say here).
    """
    if scale != 0 and not values.requires_grad and bool(values.any()):
        raise UserCodeError(
            f"defenses.{name}: what {method} returns carries no gradient (detached, or made under "
            "no_grad), so it cannot act; with weight: 0 it is only measured"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Sum over terms of scale * sum of values; its gradient is taken chunk by chunk in the forward.

    The output layer is frozen as a rule, so a chunk's only gradient is that of its hidden states.
    Where LoRA is on the output layer its matrices are passed in, and their gradient is summed up.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head: LossHead, request: Request, *trained: Tensor
    ) -> Tensor:
        gradients = [torch.zeros_like(tensor) for tensor in (hidden_TD, *trained)]
        targets_T = request.targets_BS[request.selected_BS]
        places_BS = request.places_BS
        places_T = None if places_BS is None else places_BS[request.selected_BS]
        rows_KT = torch.stack([term.positions_BS[request.selected_BS] for term in request.terms])
        rows_KT = rows_KT.cpu()  # Which terms a chunk needs is decided on the host, once.
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        with unsharded(head.model.output):
            size = head.chunk_size(hidden_TD.device)
            for start in range(0, len(hidden_TD), size):
                part = slice(start, start + size)
                with torch.enable_grad():
                    hidden_CD = hidden_TD[part].detach().requires_grad_()
                    places_C = None if places_T is None else places_T[part]
                    chunk = _Chunk(head, request, hidden_CD, targets_T[part], places_C, part)
                    total = chunk.loss(rows_KT[:, part])
                    if not total.requires_grad:
                        continue
                    found = torch.autograd.grad(total, (hidden_CD, *trained))
                gradients[0][part] = found[0]
                for gradient, addend in zip(gradients[1:], found[1:], strict=True):
                    gradient += addend
                loss += total.detach()
        # A plain attribute: activation offloading has nothing to gain from moving these.
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        grad_loss = outputs[0]
        hidden, *trained = [(g * grad_loss).to(g.dtype) for g in ctx.gradients]
        return hidden, None, None, *trained


@dataclass
class _Chunk:
    """Some of the selected positions, with the logits that its terms share."""

    head: LossHead
    request: Request
    hidden_CD: Tensor
    targets_C: Tensor
    places_C: Tensor | None
    part: slice

    def loss(self, rows_KC: Tensor) -> Tensor:
        """Scaled sum of the terms; rows_KC says which of the chunk's rows each term acts on."""
        request, head = self.request, self.head
        acting = [k for k in range(len(request.terms)) if rows_KC[k].any()]
        terms = [request.terms[k] for k in acting]
        rows = [self._rows(rows_KC[k]) for k in acting]
        computes = [
            (t.compute, t.needs_reference, t.at_targets, r)
            for t, r in zip(terms, rows, strict=True)
        ]
        reference = request.reference_TD
        at_targets = request.at_targets and reference is not None
        total = self.hidden_CD.new_zeros((), dtype=torch.float32)
        found = head.term_values(
            head.policy_logits(self.hidden_CD),
            None if at_targets else self._reference_logits(terms),
            self.targets_C,
            computes,
            self.places_C,
            reference[self.part, 0] if at_targets and reference is not None else None,
        )
        for k, term, values in zip(acting, terms, found, strict=True):
            expected = (int(rows_KC[k].sum()),)
            if not isinstance(values, Tensor) or values.shape != expected:
                what = tuple(values.shape) if isinstance(values, Tensor) else values
                raise UserCodeError(
                    f"defenses.{term.name}: logit_term must return one value a position, a tensor "
                    f"of shape {expected}, not {what}"
                )
            check_gradient(term.name, "logit_term", values, term.scale)
            if term.weights_BS is not None:
                weights_C = term.weights_BS[request.selected_BS][self.part]
                values = values * weights_C[rows_KC[k].to(weights_C.device)]
            request.sums[k] += values.detach().sum(dtype=torch.float64)
            if term.scale:  # What is only measured costs no backward.
                total = total + term.scale * values.sum()
        return total

    def _reference_logits(self, terms: list[Term]) -> Tensor | None:
        if not any(term.needs_reference for term in terms):
            return None
        assert self.request.reference_TD is not None
        return self.head.reference_logits(self.request.reference_TD[self.part])

    def _rows(self, rows_C: Tensor) -> Tensor | None:
        if rows_C.all():
            return None
        return rows_C.nonzero()[:, 0].to(self.hidden_CD.device)


def _parameters(output: Any) -> list[nn.Parameter]:
    return list(output.parameters()) if isinstance(output, nn.Module) else []
