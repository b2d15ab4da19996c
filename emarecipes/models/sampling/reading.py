"""Reads prompts into key-value caches: what all begin with once, what differs side by side.

Shapes: U different prompts, P tokens that all begin with, S the rest of a prompt, T all positions:
prompt and what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.cache import KeyValueCache

# On a CPU every new sequence length costs seconds.
PAD_TO_MULTIPLE_OF = 16
# So what prompts share is read once in few lengths; less than the first of these is not worth it.
_SHARED_MULTIPLE_OF = 8


def has_windows(model: Any) -> bool:
    """Whether a layer sees a window alone. To it padding within a row would count as distance."""
    return any(getattr(layer.attn, "sliding_window_size", None) for layer in model.layers)


class Prompts:
    """Different prompts, laid out for caches of `real_UT.shape[1]` positions.

    A row is the P tokens that all share, padding, the rest of its prompt, and room.

    Args:
        head: The model's loss head.
        prompts: Token ids, none of them empty.
        room: Positions that come after each.

    Attributes:
        size: Positions before the room.
        real_UT: Which are no padding.
    """

    def __init__(self, head: LossHead, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._model = head.model
        device = self._model.tok_embeddings.weight.device
        self._shared = shared = self._alike(prompts)
        longest = max(map(len, prompts)) - shared
        padded = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        rest = max(longest, min(padded, self._model.max_seq_len - room - shared))
        self.size = shared + rest
        tokens_US = torch.zeros(len(prompts), rest, dtype=torch.long)
        real_UT = torch.ones(len(prompts), self.size + room, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            padding = self.size - len(prompt)
            tokens_US[row, padding:] = torch.tensor(prompt[shared:])
            real_UT[row, shared : shared + padding] = False
        self._first_1P = torch.tensor([list(prompts[0][:shared])], device=device)
        self._tokens_US, self.real_UT = tokens_US.to(device), real_UT.to(device)

    def _alike(self, prompts: Sequence[Sequence[int]]) -> int:
        """P: each prompt is left with at least one token of its own."""
        if len(prompts) < 2 or has_windows(self._model):
            return 0
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        return alike // _SHARED_MULTIPLE_OF * _SHARED_MULTIPLE_OF

    def read(self, caches: Sequence[KeyValueCache]) -> Tensor:
        """What the model gives at each prompt's end, (U, V) inside `last_position_only`.

        Args:
            caches: The layers', empty; afterwards they hold a row a prompt.
        """
        shared, real_UT = self._shared, self.real_UT[:, : self.size]
        position_UT = (real_UT.cumsum(dim=1) - 1).clamp_min(0)
        seen_UTT = _causal(real_UT)
        if shared:
            seen_1PP = seen_UTT[:1, :shared, :shared]
            self._model(self._first_1P, mask=seen_1PP, input_pos=position_UT[:1, :shared])
            for cache in caches:
                cache.select(torch.zeros(len(real_UT), dtype=torch.long, device=real_UT.device))
        seen_UST, position_US = seen_UTT[:, shared:], position_UT[:, shared:]
        ends: Tensor = self._model(self._tokens_US, mask=seen_UST, input_pos=position_US)
        return ends[:, -1]


def _causal(real_UT: Tensor) -> Tensor:
    """What each position of a prompt sees, (U, T, T). Padding sees itself: a softmax over nothing
    would be nan, and 0 * nan in the next layer's values too.
    """
    itself_TT = torch.eye(real_UT.shape[1], dtype=torch.bool, device=real_UT.device)
    before_TT = torch.ones_like(itself_TT).tril()
    return (before_TT & real_UT[:, None]) | itself_TT


@contextmanager
def last_position_only(head: LossHead) -> Iterator[None]:
    """Within this context the model gives the last position's logits, (B, 1, V)."""
    head.model.unembed = lambda hidden_BSD: head(hidden_BSD[:, -1:])
    try:
        yield
    finally:
        head.model.unembed = head
