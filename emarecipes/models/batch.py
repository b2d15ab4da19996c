"""A micro-batch, and which of its positions the terms of the loss act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft
from torchtune.utils import batch_to_device

# What a model's forward takes besides `tokens`.
_MODEL_INPUTS = ("mask", "input_pos")

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class Batch:
    """Rows of one micro-batch. Position s of a row predicts its token s + 1.

    Attributes:
        inputs: What the model is called with: `tokens` (B, S); for packed rows `mask`, `input_pos`.
        targets_BS: The next token where it is trained, else the ignore index. In a pack the next
            conversation's first token is none: nothing before it is of its conversation.
        conversation_BS: The number of the conversation, rising from 0, that a token belongs to; -1
            where there is padding. A row has one, or several where rows are packed.
        sources: Each row's source, "task" or "safe".
        rows: Each row's index in the data set.
        labelled_BS: Where the next token is trained. A label of a row's first token has no position
            that predicts it and is not counted.
        real_BS: Where the next token is a real one of the same conversation.
        first_BS: Where a conversation starts.
    """

    inputs: dict[str, Any]
    targets_BS: Tensor
    conversation_BS: Tensor
    sources: list[str]
    rows: list[int]
    labelled_BS: Tensor = field(init=False)
    real_BS: Tensor = field(init=False)
    first_BS: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labelled_BS = self.targets_BS != CROSS_ENTROPY_IGNORE_IDX
        number_BS = self.conversation_BS
        same_as_next_BS = F.pad(number_BS[:, 1:] == number_BS[:, :-1], (0, 1), value=False)
        self.real_BS = same_as_next_BS & (number_BS >= 0)
        same_as_last_BS = F.pad(number_BS[:, 1:] == number_BS[:, :-1], (1, 0), value=False)
        self.first_BS = ~same_as_last_BS & (number_BS >= 0)

    @property
    def next_BS(self) -> Tensor:
        """The next token: the target where it is trained, elsewhere what comes next in the row."""
        tokens_BS = F.pad(self.inputs["tokens"][:, 1:], (0, 1))
        return torch.where(self.labelled_BS, self.targets_BS, tokens_BS)

    @property
    def places_BS(self) -> Tensor:
        """Which token of its answer the next one is, from 1; 0 where it is not trained.

        An answer is a run of trained tokens: it ends before one that is not, or a conversation's
        end.
        """
        counted_BS = self.labelled_BS.cumsum(dim=1)
        before_BS = counted_BS.masked_fill(self.labelled_BS, 0).cummax(dim=1).values
        return (counted_BS - before_BS).masked_fill(~self.labelled_BS, 0)

    @property
    def offsets_BS(self) -> Tensor:
        """Which token of its conversation each is, from 0; -1 where there is padding.

        Below P are those of a prefix of P tokens, such as `template_prefix` gives.
        """
        places_S = torch.arange(self.first_BS.shape[1], device=self.first_BS.device)
        start_BS = (places_S * self.first_BS).cummax(dim=1).values
        return (places_S - start_BS).masked_fill(self.conversation_BS < 0, -1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return int((self.conversation_BS >= 0).sum())

    def from_source(self, source: str) -> Tensor:
        """Boolean (B,): the rows of that source."""
        return torch.tensor([s == source for s in self.sources], device=self.targets_BS.device)

    def rows_of(self, source: str) -> Batch:
        """Its rows of that source alone ("all": itself); the first row, where there is none."""
        if source == "all":
            return self
        kept = [row for row, name in enumerate(self.sources) if name == source] or [0]
        number_BS = self.conversation_BS[kept]
        first = int(number_BS[0, 0])  # Of one source are rows, and so numbers, side by side.
        return Batch(
            {name: tensor[kept] for name, tensor in self.inputs.items()},
            self.targets_BS[kept],
            torch.where(number_BS < 0, number_BS, number_BS - first),
            [self.sources[row] for row in kept],
            [self.rows[row] for row in kept],
        )

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`, in place."""
        batch_to_device(self.inputs, device)
        self.targets_BS = self.targets_BS.to(device)
        self.conversation_BS = self.conversation_BS.to(device)
        self.labelled_BS = self.labelled_BS.to(device)
        self.real_BS = self.real_BS.to(device)
        self.first_BS = self.first_BS.to(device)
        return self


def make_batch(
    samples: Sequence[dict[str, Any]],
    rows: Sequence[int],
    collate: Collate,
    pad_id: int,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Collate samples of torchtune's form (`tokens`, `labels`; packs also `input_pos`, `seq_lens`).

    Args:
        samples: The rows. A row's own `source` key, if any, is "task" or "safe".
        rows: Their indices in the data set, for messages.
        collate: torchtune's collate function, already given its padding arguments.
        pad_id: Token that fills up rows.
        pad_to_multiple_of: Sequence length is rounded up to a multiple of this.
    """
    # Task rows before safe ones: a term on one source alone then finds its positions side by side.
    order = sorted(range(len(samples)), key=lambda row: _source(samples[row]) == "safe")
    samples, rows = [samples[row] for row in order], [rows[row] for row in order]
    collated = collate([{k: v for k, v in sample.items() if k != "source"} for sample in samples])
    tokens_BS, labels_BS = collated["tokens"], collated["labels"]
    extra = -tokens_BS.shape[1] % pad_to_multiple_of
    if extra and "seq_lens" not in samples[0]:
        tokens_BS = F.pad(tokens_BS, (0, extra), value=pad_id)
        labels_BS = F.pad(labels_BS, (0, extra), value=CROSS_ENTROPY_IGNORE_IDX)
    conversation_BS = torch.full(tokens_BS.shape, -1)
    number = 0
    for row, sample in enumerate(samples):
        for start, end in conversations(sample):
            conversation_BS[row, start:end] = number
            number += 1
    targets_BS = F.pad(labels_BS[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
    begins_BS = F.pad(conversation_BS[:, 1:] != conversation_BS[:, :-1], (0, 1), value=True)
    return Batch(
        inputs={"tokens": tokens_BS} | {k: collated[k] for k in _MODEL_INPUTS if k in collated},
        targets_BS=targets_BS.masked_fill(begins_BS, CROSS_ENTROPY_IGNORE_IDX),
        conversation_BS=conversation_BS,
        sources=[_source(sample) for sample in samples],
        rows=list(rows),
    )


def padded_batch(
    samples: Sequence[dict[str, Any]], rows: Sequence[int], pad_id: int, pad_to_multiple_of: int
) -> Batch:
    """`make_batch` with torchtune's padding, for rows that are not trained on."""
    collate = partial(padded_collate_sft, padding_idx=pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    return make_batch(samples, rows, collate, pad_id, pad_to_multiple_of)


def longest_first(
    rows: Sequence[Sequence[int]], batch_size: int, *, equal_together: bool = False
) -> list[list[int]]:
    """Batches of rows of like length, by their numbers, the longest first.

    Less padding, and what fits into memory once fits to the end.

    Args:
        rows: Token ids.
        batch_size: Rows a batch; the last may have fewer.
        equal_together: Of rows of one length, equal ones side by side; else in their order.
    """
    order = sorted(
        range(len(rows)), key=lambda n: (-len(rows[n]), tuple(rows[n]) if equal_together else ())
    )
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompts_together(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Batches of rows of like length, by their numbers, those of one prompt side by side.

    Args:
        prompts: Token ids of each row's prompt.
        lengths: Tokens of the row besides. Prompts with the longest of them come first.
        batch_size: Rows a batch; the last may have fewer.
    """
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[tuple(prompt)] = max(length, longest.get(tuple(prompt), 0))
    order = sorted(
        range(len(prompts)), key=lambda n: (-longest[tuple(prompts[n])], tuple(prompts[n]))
    )
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _source(sample: dict[str, Any]) -> str:
    return str(sample.get("source", "task"))


def conversations(sample: dict[str, Any]) -> list[tuple[int, int]]:
    """Start and end of each conversation in a row: one, or several where rows are packed."""
    if "seq_lens" not in sample:
        return [(0, len(sample["tokens"]))]
    ends = torch.as_tensor(sample["seq_lens"]).cumsum(0).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    # torchtune counts the padding as one more sequence, whose positions go on from the last one's.
    if len(spans) > 1 and int(sample["input_pos"][spans[-1][0]]) != 0:
        spans.pop()
    return spans
