"""The negative log-likelihood of each row's answer.

Shapes: B rows, S sequence, T labelled positions, C a chunk of them, D width, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torchtune.modules.peft import disable_adapter

from emarecipes.models._torchtune import unsharded
from emarecipes.models.batch import Batch
from emarecipes.models.loss_head import LossHead, cross_entropy
from emarecipes.models.loss_terms import Request, Term


def reference_where(reference: bool, model: Any) -> AbstractContextManager[None]:
    """A context in which the model is its reference, the adapter off, or the model as it is."""
    context: AbstractContextManager[None] = disable_adapter(model) if reference else nullcontext()
    return context


def row_nll(model: Any, head: LossHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over a row's labelled tokens of -log p(token | what comes before it), in nats.

    Args:
        model: See `token_nll`.
        head: See `token_nll`.
        batch: On the model's device. Rows come in the order of `batch.rows`.

    Returns:
        The sums (B,), float64, and how many tokens each is over (B,), both on the CPU. A row
        without labels has 0 and 0.
    """
    nll_T, tokens_B = token_nll(model, head, batch)
    row_T = torch.arange(len(tokens_B)).repeat_interleave(tokens_B)
    return torch.zeros(len(tokens_B), dtype=torch.float64).index_add_(0, row_T, nll_T), tokens_B


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
