"""Rotary positions: what config.json says of them, and the frequencies that follow.

Shapes: S positions, P pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emarecipes.errors import UserError
from emarecipes.models.families.config_json import ConfigJson
from emarecipes.models.families.shape import Rope

_KINDS = ("default", "linear", "llama3", "longrope")


def read_rope(c: ConfigJson, head_dim: int, longest: int, *, partial: bool = False) -> Rope:
    """The rotary positions that `rope_theta`, `rope_scaling` and `rope_parameters` describe.

    Newer files have all in `rope_parameters`; Gemma 3's has one entry there a kind of layer, of
    which this reads that of full attention.

    Args:
        c: The model's config.json.
        head_dim: Size of a head.
        longest: max_position_embeddings.
        partial: Whether the family turns a part of each head where the file says so. Others do
            not heed it in transformers 5, and fail on it in earlier ones.

    Raises:
        UserError: A scaling that is not known, or a field of it.
    """
    key = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    part = c.part(key)
    if part.get("full_attention") is not None:
        part.get("sliding_attention")
        part.check_all_read()
        part = part.part("full_attention")
    kind = part.get("rope_type") or part.get("type") or "default"
    part.get("type")
    if kind == "su":  # LongRoPE's name in the first Phi-3.
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"{part.where}: its type {kind!r:.60} is not known: {', '.join(_KINDS)}")
    in_part = part.get("rope_theta") is not None
    base = part.number("rope_theta") if in_part else c.number("rope_theta")
    share = 1.0
    if partial:
        share = part.cap("partial_rotary_factor") or c.cap("partial_rotary_factor") or 1.0
    rope = Rope(int(head_dim * share), base)
    if rope.dim < 2 or rope.dim % 2 or rope.dim > head_dim:
        key = "partial_rotary_factor" if share != 1.0 else "head_dim"
        c.refuse(key, f"so that {rope.dim} of a head's {head_dim} numbers turn: not pairs of them")
    key = "original_max_position_embeddings"
    original = (c if c.get(key) else part).size(key, longest)
    part.get(key)
    if kind == "linear":
        rope = Rope(rope.dim, base, linear=part.number("factor"))
    elif kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (part.number(key) for key in keys)
        rope = Rope(rope.dim, base, llama3=(factor, low, high, float(original)))
    elif kind == "longrope":
        rope = _longrope(part, rope, original, longest)
    part.check_all_read({"partial_rotary_factor": 1.0})
    return rope


def _longrope(part: ConfigJson, rope: Rope, original: int, longest: int) -> Rope:
    short = part.numbers("short_factor", rope.dim // 2)
    part.get("long_factor")
    factor = part.cap("factor") or longest / original
    magnitude = part.cap("attention_factor")
    if magnitude is None:
        grown = factor > 1.0 and original > 1
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    return Rope(rope.dim, rope.base, short_factor=short, magnitude=magnitude)


def frequencies(rope: Rope) -> Tensor:
    """f_i of each pair, float32 (P,); in transformers' order of operations, for equal rounding."""
    powers_P = rope.base ** (torch.arange(0, rope.dim, 2).float() / rope.dim)
    if rope.short_factor is not None:
        short_P: Tensor = 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32) * powers_P)
        return short_P
    f_P: Tensor = 1.0 / powers_P
    if rope.llama3 is None:
        return f_P / rope.linear
    factor, low, high, context = rope.llama3
    wave_P = 2 * math.pi / f_P
    divided_P = torch.where(wave_P > context / low, f_P / factor, f_P)
    smooth_P = (context / wave_P - low) / (high - low)
    smoothed_P = (1 - smooth_P) * divided_P / factor + smooth_P * divided_P
    between_P = ~(wave_P < context / high) & ~(wave_P > context / low)
    return torch.where(between_P, smoothed_P, divided_P)
