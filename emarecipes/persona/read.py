"""Reads given answers in one forward each: mean activations and likelihoods.

Shapes: N answers, B batch, S sequence, K = layers + 1 residual indices, D width. Residual index 0
is the embeddings, k the stream after k layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from emarecipes.models._torchtune import final_norm_and_cap
from emarecipes.models.batch import longest_first
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.sampler import PAD_TO_MULTIPLE_OF
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
    head: LossHead,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
    label: str,
) -> Reading:
    """Read each answer behind its prompt.

    Args:
        head: The model's loss head.
        prompts: Token ids, generation prompt included.
        answers: Token ids, at least one each.
        batch_size: Rows at a time.
        label: What the progress bar is called.
    """
    model = head.model
    indices, width = len(model.layers) + 1, model.tok_embeddings.embedding_dim
    count = len(prompts)
    reading = Reading(
        torch.zeros(count, indices, width), torch.zeros(count, indices), torch.zeros(count)
    )
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    with Progress(total=count, unit="answer", desc=label) as bar:
        for rows in longest_first(whole, batch_size):
            batch = _Rows(
                [prompts[row] for row in rows],
                [answers[row] for row in rows],
                head.model.max_seq_len,
                model.tok_embeddings.weight.device,
            )
            _read_batch(head, batch, reading, rows)
            bar.update(len(rows))
    return reading


class _Rows:
    """Right-padded rows of prompt and answer. Causal attention needs no mask for the padding.

    Attributes:
        tokens_BS: Token ids.
        answer_BS: Where a token is the answer's.
        share_BS: The same as float32, each row's sum 1.
    """

    def __init__(
        self,
        prompts: list[Sequence[int]],
        answers: list[Sequence[int]],
        max_seq_len: int,
        device: torch.device,
    ) -> None:
        rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        size = -(-max(map(len, rows)) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        tokens_BS = torch.zeros(len(rows), min(size, max_seq_len), dtype=torch.long)
        answer_BS = torch.zeros(tokens_BS.shape, dtype=torch.bool)
        for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
            tokens_BS[row, : len(tokens)] = torch.tensor(tokens)
            answer_BS[row, len(prompt) : len(tokens)] = True
        self.tokens_BS = tokens_BS.to(device)
        self.answer_BS = answer_BS.to(device)
        self.share_BS = self.answer_BS / self.answer_BS.sum(dim=1, keepdim=True)


def _read_batch(head: LossHead, batch: _Rows, reading: Reading, rows: list[int]) -> None:
    def note(index: int, hidden_BSD: Tensor) -> None:
        hidden_BSD = hidden_BSD.float()
        mean_BD = (batch.share_BS[:, None] @ hidden_BSD)[:, 0]
        square_BS = hidden_BSD.square().sum(dim=-1)
        reading.activation_NKD[rows, index] = mean_BD.cpu()
        reading.square_NK[rows, index] = (batch.share_BS * square_BS).sum(dim=1).cpu()

    with _residuals(head, note):
        hidden_BSD = head.model(batch.tokens_BS)
    reading.log_likelihood_N[rows] = _log_likelihood(head, batch, hidden_BSD).cpu()


def _log_likelihood(head: LossHead, batch: _Rows, hidden_BSD: Tensor) -> Tensor:
    """Mean log-likelihood of each row's answer, (B,), chunk by chunk."""
    norm, _ = final_norm_and_cap(head.model)
    row_T, column_T = batch.answer_BS.nonzero(as_tuple=True)
    before_TD = hidden_BSD[row_T, column_T - 1]
    target_T = batch.tokens_BS[row_T, column_T]
    total_B = torch.zeros(len(hidden_BSD), device=hidden_BSD.device)
    size = head.chunk_size(hidden_BSD.device)
    for start in range(0, len(row_T), size):
        part = slice(start, start + size)
        log_CV = head.log_probabilities(norm(before_TD[part]))
        total_B.index_add_(0, row_T[part], log_CV.gather(1, target_T[part, None])[:, 0])
    return total_B / batch.answer_BS.sum(dim=1)


@contextmanager
def _residuals(head: LossHead, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within this context `note` gets each residual index's (B, S, D), and the model returns the
    last one instead of logits.
    """
    model = head.model

    def watch(index: int) -> Callable[..., None]:
        return lambda module, inputs: note(index, inputs[0])

    def last(hidden_BSD: Tensor) -> Tensor:
        note(len(model.layers), hidden_BSD)
        return hidden_BSD

    hooks = [layer.register_forward_pre_hook(watch(i)) for i, layer in enumerate(model.layers)]
    model.unembed = last
    try:
        yield
    finally:
        model.unembed = head
        for hook in hooks:
            hook.remove()
