"""Reads given answers in one forward each: mean activations and likelihoods.

Shapes: N answers, B batch, S sequence, K = layers + 1 residual indices, D width. Residual index 0
is the embeddings, k the stream after k layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emarecipes.models.batch import Batch, longest_first
from emarecipes.models.likelihoods import ByNumber, GivenAnswers, row_sums
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.reading import PAD_TO_MULTIPLE_OF
from emarecipes.progress import Progress


@dataclass
class Reading:
    """What was found in N answers, float32 on the CPU.

    Attributes:
        activation_NKD: Mean over an answer's tokens of the residual stream at these tokens.
        square_NK: Mean over an answer's tokens of |h|^2.
        log_likelihood_N: Mean over an answer's tokens of log p(token | what is before it).
    """

    activation_NKD: Tensor
    square_NK: Tensor
    log_likelihood_N: Tensor


@torch.no_grad()
def read_activations(
    head: LossHead, rows: ByNumber, *, batch_size: int, label: str, reference: bool
) -> Reading:
    """Read each row's answer, which is what it has labels on.

    Args:
        head: The model's loss head.
        rows: With at least one label each.
        batch_size: Rows at a time.
        label: What the progress bar is called.
        reference: With the adapter off.
    """
    model = head.model
    indices, width = len(model.layers) + 1, model.tok_embeddings.embedding_dim
    count = len(rows)
    reading = Reading(
        torch.zeros(count, indices, width), torch.zeros(count, indices), torch.zeros(count)
    )
    # No row is filled up to more than the model takes.
    multiple = math.gcd(PAD_TO_MULTIPLE_OF, model.max_seq_len)
    given = GivenAnswers(rows, 0, multiple, model.tok_embeddings.weight.device)
    batches = longest_first([rows[n]["tokens"] for n in range(count)], batch_size)
    with Progress(total=count, unit="answer", desc=label) as bar:
        for numbers, nll_T, tokens_B in given.nll(
            head,
            batches,
            reference=reference,
            around=lambda batch: _residuals(model, batch, reading),
        ):
            reading.log_likelihood_N[numbers] = -(row_sums(nll_T, tokens_B) / tokens_B).float()
            bar.update(len(numbers))
    return reading


@contextmanager
def _residuals(model: Any, batch: Batch, reading: Reading) -> Iterator[None]:
    """Within this context a forward of the batch's tokens puts its activations into `reading`."""
    answer_BS = F.pad(batch.labelled_BS[:, :-1], (1, 0))  # A label stands one place to the left.
    share_BS = answer_BS / answer_BS.sum(dim=1, keepdim=True)

    def note(index: int, hidden_BSD: Tensor) -> None:
        hidden_BSD = hidden_BSD.float()
        mean_BD = (share_BS[:, None] @ hidden_BSD)[:, 0]
        square_BS = hidden_BSD.square().sum(dim=-1)
        reading.activation_NKD[batch.rows, index] = mean_BD.cpu()
        reading.square_NK[batch.rows, index] = (share_BS * square_BS).sum(dim=1).cpu()

    def before(index: int) -> Callable[..., None]:
        return lambda module, inputs: note(index, inputs[0])

    def behind(module: Any, inputs: Any, output_BSD: Tensor) -> None:
        note(len(model.layers), output_BSD)

    hooks = [layer.register_forward_pre_hook(before(i)) for i, layer in enumerate(model.layers)]
    hooks.append(model.layers[-1].register_forward_hook(behind))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
