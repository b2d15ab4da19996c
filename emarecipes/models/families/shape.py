"""What a decoder computes, whatever its family: read from config.json, and all that is built from.

Every family here is one stack: embedding, layers of attention and a gated MLP with norms around
them, a norm, an output layer. What differs between families is a field below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer: pair i of `dim` / 2 turns by position * f_i.

        f_i = base ** (-2 i / dim), then changed by one of the scalings, if there is one.

    Attributes:
        dim: How many of a head's numbers turn; the rest stay.
        base: See above.
        linear: Divides every f_i.
        llama3: factor, low_freq_factor, high_freq_factor, original context: long waves are divided
            by the factor, short ones kept, and those between interpolated.
        short_factor: LongRoPE's divisors, one a pair, for rows up to the original context.
        magnitude: Factor of what is turned (LongRoPE's attention factor).
    """

    dim: int
    base: float
    linear: float = 1.0
    llama3: tuple[float, float, float, float] | None = None
    short_factor: tuple[float, ...] | None = None
    magnitude: float = 1.0


@dataclass(frozen=True)
class LayerShape:
    """What differs between the layers of a model.

    Attributes:
        window: A token sees so many, itself included; None: all before it.
        rope: None: the layer has no positions.
    """

    window: int | None
    rope: Rope | None


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's sizes and choices.

    Attributes:
        family: config.json's model_type.
        width, heads, kv_heads, head_dim, mlp_width, vocabulary: Sizes.
        max_seq_len: Longest row.
        layers: From the first.
        activation: Of the MLP's gate.
        norm_eps: Of every norm.
        norms: Around attention and MLP: before them; after them; both.
        one_plus: Norms multiply by 1 + weight instead of the weight.
        qk_norm: Norms of queries and keys before positions: of each head, or of all heads at once.
        qkv_bias, output_bias, mlp_bias: Which linear layers have one.
        tied: The output layer is the embedding.
        fused: Hugging Face holds q, k, v in one weight, and gate and up in another.
        attention_scale: Factor of q k^T.
        attention_cap, logit_cap: x becomes cap * tanh(x / cap).
        embedding_scale, residual_scale, logit_scale: Factors; of embeddings, of what attention and
            MLP add to the stream, of logits.
        prefix: Of Hugging Face's names.
    """

    family: str
    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_seq_len: int
    layers: tuple[LayerShape, ...]
    activation: Literal["silu", "gelu_tanh", "gelu"]
    norm_eps: float
    attention_scale: float
    tied: bool
    norms: Literal["before", "after", "both"] = "before"
    one_plus: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    prefix: str = "model."
