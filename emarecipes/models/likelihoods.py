"""The negative log-likelihood of each row's answer.

Shapes: B rows, S sequence, T labelled positions, C a chunk of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.peft import disable_adapter

from emarecipes.models._torchtune import unsharded
from emarecipes.models.batch import Batch, padded_batch
from emarecipes.models.loss_head import LossHead, cross_entropy
from emarecipes.models.loss_terms import Request, Term


def reference_where(reference: bool, model: Any) -> AbstractContextManager[None]:
    """A context in which the model is its reference, the adapter off, or the model as it is."""
    context: AbstractContextManager[None] = disable_adapter(model) if reference else nullcontext()
    return context


class ByNumber(Protocol):
    """`tokens` and `labels` of rows."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, row: int, /) -> Any:
        """Those of one."""


def answer_row(prompt: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
    """A row in which the answer's tokens are what is scored."""
    labels = [*[CROSS_ENTROPY_IGNORE_IDX] * len(prompt), *answer]
    return {"tokens": [*prompt, *answer], "labels": labels}


@dataclass(frozen=True)
class GivenAnswers:
    """Rows whose labels are what is scored: the one way to the likelihoods of given answers.

    Attributes:
        samples: Rows in the form that collate functions take, by their number.
        pad_id: Token that fills up rows.
        pad_to_multiple_of: Row lengths are rounded up to a multiple of this.
        device: The model's.
    """

    samples: ByNumber
    pad_id: int
    pad_to_multiple_of: int
    device: torch.device

    def nll(
        self,
        head: LossHead,
        batches: Iterable[list[int]],
        *,
        reference: bool,
        around: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """-log p of every labelled token, batch by batch.

        Args:
            head: The model's loss head.
            batches: Rows by their number, as `longest_first` puts them together.
            reference: With the adapter off.
            around: A context around the forward of a batch, for who reads more than likelihoods.

        Yields:
            A batch's rows in the order of what follows, and what `token_nll` gives of it.
        """
        for rows in batches:
            samples = [self.samples[row] for row in rows]
            batch = padded_batch(samples, rows, self.pad_id, self.pad_to_multiple_of)
            batch.to(self.device)
            with reference_where(reference, head.model), around(batch):
                nll_T, tokens_B = token_nll(head.model, head, batch)
            yield batch.rows, nll_T, tokens_B

    def mean_nll(
        self, head: LossHead, batches: Iterable[list[int]], *, reference: bool
    ) -> dict[int, float]:
        """The mean over each row's labelled tokens of -log p, in nats, by the row's number."""
        found: dict[int, float] = {}
        for rows, nll_T, tokens_B in self.nll(head, batches, reference=reference):
            mean_B = row_sums(nll_T, tokens_B) / tokens_B
            found |= dict(zip(rows, mean_B.tolist(), strict=True))
        return found


def row_sums(nll_T: Tensor, tokens_B: Tensor) -> Tensor:
    """Sum over each row's tokens of what `token_nll` gives, (B,), float64; 0 of a row without."""
    row_T = torch.arange(len(tokens_B)).repeat_interleave(tokens_B)
    return torch.zeros(len(tokens_B), dtype=torch.float64).index_add_(0, row_T, nll_T)


def row_nll(model: Any, head: LossHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """`row_sums` of a batch, and how many tokens each is over (B,), both on the CPU.

    Args:
        model: See `token_nll`.
        head: See `token_nll`.
        batch: On the model's device. Rows come in the order of `batch.rows`.
    """
    nll_T, tokens_B = token_nll(model, head, batch)
    return row_sums(nll_T, tokens_B), tokens_B


@torch.no_grad()
def token_nll(model: Any, head: LossHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """-log p(token | what comes before it) of every labelled token, in nats.

    Logits are computed at labelled positions alone, chunk by chunk, inside the model's forward,
    where FSDP2 has the output layer's weights whole. With the adapter as it is: call it inside
    `reference_where(True, model)` for the reference.

    Args:
        model: torchtune's decoder in eval mode; may be sharded, then every process calls this with
            a batch of its own.
        head: Its loss head.
        batch: On the model's device.

    Returns:
        The values (T,), float64, row after row in the order of `batch.rows`, and how many of them
        each row has (B,), both on the CPU.
    """
    labelled = Term("nll", cross_entropy, batch.labelled_BS, scale=1.0)
    request = Request([labelled], batch.targets_BS)
    targets_T = batch.targets_BS[request.selected_BS]

    def unembed(hidden_BSD: Tensor) -> Tensor:
        hidden_TD = head(hidden_BSD)
        size = head.chunk_size(hidden_TD.device)
        chunks = zip(hidden_TD.split(size), targets_T.split(size), strict=True)
        with unsharded(model.output):
            parts = [cross_entropy(head.log_probabilities(h), None, t) for h, t in chunks]
        return torch.cat(parts)

    model.unembed = unembed
    try:
        with head.computing(request, reference_only=True):
            output = model(**batch.inputs)
    finally:
        model.unembed = head
        head.last_hidden_BSD = None
    # A list where a defense has the model give hidden states too.
    nll_T = output[-1] if isinstance(output, list) else output
    return nll_T.cpu().double(), batch.labelled_BS.sum(dim=1).cpu()
