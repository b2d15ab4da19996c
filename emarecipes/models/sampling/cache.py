"""Attention over a key-value cache, in place of the forward of torchtune's attention layers.

torchtune's own cache always attends to its whole length, copies keys and values once more for
grouped queries, and cannot lose rows. For one query a row, two plain products are several times as
fast on a CPU as the fused kernel.

Shapes: B batch, S new positions, T positions so far, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emarecipes.models.families.blocks import Attention


class KeyValueCache:
    """Keys and values of one attention layer; its `attend` is the layer's forward meanwhile.

    Args:
        attention: torchtune's MultiHeadAttention, Gemma 2's own with window and soft cap, or
            `lora_model`'s.
        length: The largest number of positions.
    """

    def __init__(self, attention: Any, length: int) -> None:
        self._attention = attention
        self._length = length
        self._end = 0
        self._key_BGTD: Tensor | None = None
        self._value_BGTD: Tensor | None = None
        self._scale = float(getattr(attention, "scaling", attention.head_dim**-0.5))
        self._cap: float | None = getattr(attention, "softcapping", None)
        self._window: int | None = getattr(attention, "sliding_window_size", None)

    def attend(
        self, x: Tensor, y: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """The layer's output for new positions, (B, S, width).

        Args:
            x: Their hidden states, (B, S, width).
            y: The same.
            mask: (B, S, T), true where a new position sees one; None: every new one sees all.
            input_pos: Positions in their own rows, (B, S).
        """
        a = self._attention
        if isinstance(a, Attention):
            query, key, value_BGSD = a.project(x, input_pos)
            return self._output(query, key, value_BGSD, mask, x)
        query_BSHD = a.q_proj(x).unflatten(-1, (a.num_heads, a.head_dim))
        key_BSGD = a.k_proj(x).unflatten(-1, (a.num_kv_heads, a.head_dim))
        value_BSGD = a.v_proj(x).unflatten(-1, (a.num_kv_heads, a.head_dim))
        if a.pos_embeddings is not None:
            query_BSHD = a.pos_embeddings(query_BSHD, input_pos=input_pos)
            key_BSGD = a.pos_embeddings(key_BSGD, input_pos=input_pos)
        query, key = query_BSHD.transpose(1, 2), key_BSGD.transpose(1, 2)
        if a.q_norm is not None:
            query, key = a.q_norm(query), a.k_norm(key)
        return self._output(query, key, value_BSGD.transpose(1, 2), mask, x)

    def _output(
        self, query_BHSD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, x: Tensor
    ) -> Tensor:
        key, value = self._append(key, value)
        output_BHSD = self._weighted(query_BHSD, key, value, self._in_window(mask, x))
        attended_BSD: Tensor = self._attention.output_proj(output_BHSD.transpose(1, 2).flatten(2))
        return attended_BSD

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, which may repeat."""
        assert self._key_BGTD is not None and self._value_BGTD is not None
        self._key_BGTD, self._value_BGTD = self._key_BGTD[rows], self._value_BGTD[rows]

    def _append(self, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        if self._key_BGTD is None or self._value_BGTD is None:
            rows, heads, _, width = key_BGSD.shape
            self._key_BGTD = key_BGSD.new_empty(rows, heads, self._length, width)
            self._value_BGTD = torch.empty_like(self._key_BGTD)
        new = slice(self._end, self._end + key_BGSD.shape[2])
        self._key_BGTD[:, :, new], self._value_BGTD[:, :, new] = key_BGSD, value_BGSD
        self._end = new.stop
        return self._key_BGTD[:, :, : self._end], self._value_BGTD[:, :, : self._end]

    def _in_window(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if self._window is None:
            return mask
        at_T = torch.arange(self._end, device=x.device)
        near_ST = at_T[-x.shape[1] :, None] - at_T[None] < self._window
        return near_ST[None] if mask is None else mask & near_ST

    def _weighted(
        self, query_BHSD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """softmax(cap(q k^T * scale)) v, (B, H, S, D)."""
        new = query_BHSD.shape[2]
        if new > 1 and self._cap is None:
            return F.scaled_dot_product_attention(
                query_BHSD,
                key,
                value,
                attn_mask=None if mask is None else mask[:, None],
                scale=self._scale,
                enable_gqa=query_BHSD.shape[1] != key.shape[1],
            )
        # The queries of a key-value head side by side: no copies of keys and values.
        query_BGMD = query_BHSD.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        score_BGMT = ((query_BGMD * self._scale) @ key.transpose(2, 3)).float()
        if self._cap is not None:
            score_BGMT = self._cap * torch.tanh(score_BGMT / self._cap)
        score = score_BGMT.unflatten(2, (-1, new))
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], float("-inf"))
        weight_BGMT = torch.softmax(score, dim=-1).to(value.dtype).flatten(2, 3)
        weighted: Tensor = (weight_BGMT @ value).unflatten(2, (-1, new)).flatten(1, 2)
        return weighted


@contextmanager
def caching(model: Any, length: int) -> Iterator[list[KeyValueCache]]:
    """Within this context the model's attention layers keep what they have seen.

    Args:
        model: torchtune's decoder.
        length: The largest number of positions.

    Yields:
        The layers' caches, empty.
    """
    caches = [KeyValueCache(layer.attn, length) for layer in model.layers]
    for layer, cache in zip(model.layers, caches, strict=True):
        layer.attn.forward = cache.attend
    try:
        yield caches
    finally:
        for layer in model.layers:
            del layer.attn.forward
