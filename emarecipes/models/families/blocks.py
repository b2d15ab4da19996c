"""The modules that torchtune has not: its others are used as they are.

Shapes: B batch, S sequence, H heads, G key-value heads, D head width, P pairs of it that turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtune.modules import MultiHeadAttention, RMSNorm, TransformerDecoder

from emarecipes.models.families.rope import frequencies
from emarecipes.models.families.shape import DecoderShape, Rope

_ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class HalfRotation(nn.Module):
    """Rotary positions that turn number i with number i + P, as Hugging Face's weights lie.

    torchtune's turn neighbours, and the rows of its query and key weights are in another order.

    Args:
        rope: Base and scaling.
        max_seq_len: Positions in its table.
    """

    cache: Tensor

    def __init__(self, rope: Rope, max_seq_len: int) -> None:
        super().__init__()
        self.rope = rope
        self.dim, self.base, self.max_seq_len = rope.dim, rope.base, max_seq_len
        self.rope_init()

    def rope_init(self) -> None:
        """Make the table; torchtune's distributed recipe calls it once weights are on a device."""
        positions_S = torch.arange(self.max_seq_len).float()
        angles_SP = torch.outer(positions_S, frequencies(self.rope))
        table = torch.cat([angles_SP.cos(), angles_SP.sin()], dim=-1) * self.rope.magnitude
        self.register_buffer("cache", table, persistent=False)

    def forward(self, x_BSHD: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Turned heads.

        Args:
            x_BSHD: Queries or keys.
            input_pos: Positions (B, S); None: 0 to S - 1.
        """
        table = self.cache[: x_BSHD.shape[1]] if input_pos is None else self.cache[input_pos]
        cos, sin = table.to(x_BSHD.dtype).unsqueeze(-2).chunk(2, dim=-1)
        one, other = x_BSHD[..., : self.dim].chunk(2, dim=-1)
        parts = [one * cos - other * sin, other * cos + one * sin]
        if self.dim < x_BSHD.shape[-1]:
            parts.append(x_BSHD[..., self.dim :])
        return torch.cat(parts, dim=-1)


class Attention(MultiHeadAttention):
    """torchtune's attention with a scale, soft cap and window of its own.

    Queries and keys are normed before positions, a head at a time or all at once.

    Args:
        shape: The decoder's.
        window: See `LayerShape`.
        layers: torchtune's arguments: projections, norms, positions.
    """

    def __init__(self, shape: DecoderShape, window: int | None, **layers: nn.Module | None) -> None:
        super().__init__(
            embed_dim=shape.width,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_seq_len=shape.max_seq_len,
            **layers,
        )
        # Named as in torchtune's Gemma 2.
        self.scaling = shape.attention_scale
        self.softcapping = shape.attention_cap
        self.sliding_window_size = window
        self._norms_all_heads = shape.qk_norm == "all"

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | BlockMask | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, (B, S, width).

        Args:
            x: Hidden states, (B, S, width).
            y: The same.
            mask: (B, S, S), true where a position sees one, or flex attention's; None: causal.
            input_pos: Positions in their own rows, (B, S).
        """
        query, key, value = self.project(x, input_pos)
        output_BHSD = attend(
            query, key, value, mask, self.scaling, self.softcapping, self.sliding_window_size
        )
        attended: Tensor = self.output_proj(output_BHSD.transpose(1, 2).flatten(2))
        return attended

    def project(self, x: Tensor, input_pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, S, D), keys and values (B, G, S, D), normed and turned."""
        query = self._heads(self.q_proj(x), self.q_norm, input_pos)
        key = self._heads(self.k_proj(x), self.k_norm, input_pos)
        value_BSGD = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return query, key, value_BSGD.transpose(1, 2)

    def _heads(self, flat: Tensor, norm: nn.Module | None, input_pos: Tensor | None) -> Tensor:
        if norm is not None and self._norms_all_heads:
            flat = norm(flat)
        x_BSHD: Tensor = flat.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not self._norms_all_heads:
            x_BSHD = norm(x_BSHD)
        if self.pos_embeddings is not None:
            x_BSHD = self.pos_embeddings(x_BSHD, input_pos=input_pos)
        return x_BSHD.transpose(1, 2)


def attend(
    query_BHSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask: Tensor | BlockMask | None,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Tensor:
    """softmax(cap(scale q k^T)) v over what the mask and the window leave, (B, H, S, D).

    With a cap it is computed in plain steps that hold all scores; packed rows on a GPU come with
    flex attention's mask and hold none.
    """
    heads, size = query_BHSD.shape[1:3]
    if isinstance(mask, BlockMask):
        flex = _compiled_flex()
        flexed: Tensor = flex(
            query_BHSD,
            key_BGSD,
            value_BGSD,
            score_mod=score_mod(cap, window if window is not None and window < size else None),
            block_mask=mask,
            scale=scale,
            enable_gqa=key_BGSD.shape[1] != heads,
        )
        return flexed
    if window is not None and window < size:
        mask = _within_window(mask, size, window, query_BHSD.device)
    if key_BGSD.shape[1] != heads:
        key_BGSD, value_BGSD = (
            x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
            for x in (key_BGSD, value_BGSD)
        )
    if cap is None:
        return F.scaled_dot_product_attention(
            query_BHSD,
            key_BGSD,
            value_BGSD,
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            scale=scale,
        )
    if mask is None:
        mask = torch.ones(1, size, size, dtype=torch.bool, device=query_BHSD.device).tril()
    score = cap * torch.tanh(query_BHSD @ key_BGSD.transpose(2, 3) * (scale / cap))
    score = score.float().masked_fill(~mask[:, None], float("-inf"))
    return torch.softmax(score, dim=-1).to(value_BGSD.dtype) @ value_BGSD


def _within_window(mask: Tensor | None, size: int, window: int, device: torch.device) -> Tensor:
    at_S = torch.arange(size, device=device)
    back_SS = at_S[:, None] - at_S[None]
    near_SS = back_SS < window
    return (near_SS & (back_SS >= 0))[None] if mask is None else mask & near_SS


@lru_cache
def score_mod(cap: float | None, window: int | None) -> _ScoreMod | None:
    """What flex attention does with a score; one function for all layers, compiled once.

    In a pack, indices of one conversation are as far apart as its positions.
    """
    if cap is None and window is None:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if window is not None:
            score = torch.where(query - key < window, score, -float("inf"))
        return score

    return change


@lru_cache
def _compiled_flex() -> Any:
    """Flex attention, compiled by itself whether the model is or not, as in torchtune."""
    compiled = torch.compile(flex_attention, dynamic=False)
    return torch.compiler.disable(compiled, recursive=False)


class ScaledEmbedding(nn.Embedding):
    """An embedding times a factor, which is rounded to the embedding's type (as Gemma's is)."""

    def __init__(self, vocabulary: int, width: int, factor: float) -> None:
        super().__init__(vocabulary, width)
        self.factor = factor

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) to (B, S, width)."""
        x = super().forward(tokens)
        return x * torch.tensor(self.factor, dtype=x.dtype)


class ScaledRMSNorm(RMSNorm):
    """A norm times a factor."""

    def __init__(self, width: int, eps: float, factor: float) -> None:
        super().__init__(width, eps=eps)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Normed states of the same shape."""
        normed: Tensor = super().forward(x)
        return normed * self.factor


class Scale(nn.Module):
    """x times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """x * factor."""
        return x * self.factor


class Decoder(TransformerDecoder):
    """torchtune's decoder that knows its shape, with a soft cap on its logits if it has one.

    Attributes:
        shape: What it was built from.
        logit_cap: See `DecoderShape`; the loss head reads it.
    """

    def __init__(self, shape: DecoderShape, **arguments: Any) -> None:
        super().__init__(
            max_seq_len=shape.max_seq_len,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            **arguments,
        )
        self.shape = shape
        self.logit_cap = shape.logit_cap

    def unembed(self, h: Tensor) -> Tensor:
        """Logits of the last layer's states, float32 (B, S, V)."""
        logits: Tensor = super().unembed(h)
        if self.logit_cap is None:
            return logits
        return self.logit_cap * torch.tanh(logits / self.logit_cap)
