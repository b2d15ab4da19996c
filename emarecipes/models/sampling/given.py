"""Likelihoods of given answers, a prompt read once for all of its own.

Shapes: B rows, S their tokens behind the prompt, T of prompt and these; and T labelled positions in
`nll_T`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from emarecipes.models.batch import Batch, longest_first, padded_batch, prompts_together
from emarecipes.models.likelihoods import GivenAnswers, reference_where, token_nll
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.cache import caching
from emarecipes.models.sampling.reading import Prompts, has_windows, last_position_only


def nll_by_prompt(
    given: GivenAnswers, head: LossHead, batch_size: int, *, reference: bool
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`GivenAnswers.nll` of all samples, a prompt read once for its answers in a batch.

    It does not in layers that see a window, nor where a row has a label among its first two
    tokens or none: then it is that one. The values are the same but for rounding.

    Args:
        given: The rows.
        head: The model's loss head.
        batch_size: Rows a batch.
        reference: With the adapter off.
    """
    samples = [given.samples[row] for row in range(len(given.samples))]
    starts = [_first_label(sample["labels"]) - 1 for sample in samples]
    if has_windows(head.model) or min(starts) < 1:
        tokens = [sample["tokens"] for sample in samples]
        yield from given.nll(head, longest_first(tokens, batch_size), reference=reference)
        return
    prompts = [s["tokens"][:start] for s, start in zip(samples, starts, strict=True)]
    # The prompt's last token comes again in each row: what follows it differs.
    rest = [
        {"tokens": s["tokens"][start:], "labels": s["labels"][start:]}
        for s, start in zip(samples, starts, strict=True)
    ]
    lengths = [len(sample["tokens"]) for sample in rest]
    for rows in prompts_together(prompts, lengths, batch_size):
        batch = padded_batch(
            [rest[row] for row in rows], rows, given.pad_id, given.pad_to_multiple_of
        )
        batch.to(given.device)
        with reference_where(reference, head.model):
            nll_T, tokens_B = _nll_after(head, [prompts[row] for row in rows], batch)
        yield batch.rows, nll_T, tokens_B


def _first_label(labels: Sequence[int]) -> int:
    """The place of the first token that is scored; 0 where there is none."""
    return next((n for n, label in enumerate(labels) if label != CROSS_ENTROPY_IGNORE_IDX), 0)


@torch.no_grad()
def _nll_after(
    head: LossHead, prompts: Sequence[Sequence[int]], batch: Batch
) -> tuple[Tensor, Tensor]:
    """`token_nll` of rows that go on behind prompts, which are one row's each."""
    model = head.model
    different = list(dict.fromkeys(map(tuple, prompts)))
    tokens_BS = batch.inputs["tokens"]
    reading = Prompts(head, different, tokens_BS.shape[1])
    source_B = torch.tensor([different.index(tuple(p)) for p in prompts], device=tokens_BS.device)
    with caching(model, reading.real_UT.shape[1]) as caches:
        with last_position_only(head):
            reading.read(caches)
        for cache in caches:
            cache.select(source_B)
        real_BT = reading.real_UT[source_B]
        before_BT = real_BT[:, : reading.size]
        within_SS = torch.ones(2 * tokens_BS.shape[1:], dtype=torch.bool, device=tokens_BS.device)
        batch.inputs["mask"] = torch.cat(
            [
                before_BT[:, None].expand(-1, tokens_BS.shape[1], -1),
                within_SS.tril().expand(len(tokens_BS), -1, -1),
            ],
            dim=2,
        )
        at_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        position_BS = before_BT.sum(dim=1, keepdim=True) + at_S
        # Padding may stand behind the last position that there is.
        batch.inputs["input_pos"] = position_BS.clamp_max(model.max_seq_len - 1)
        return token_nll(model, head, batch)
