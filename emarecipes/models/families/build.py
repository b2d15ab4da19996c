"""`lora_model`: a config's `model._component_` for any model folder of a known family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import (
    FeedForward,
    FrozenNF4Linear,
    RMSNorm,
    TiedLinear,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear

from emarecipes.errors import UserError
from emarecipes.models.families.blocks import (
    Attention,
    Decoder,
    HalfRotation,
    Scale,
    ScaledEmbedding,
    ScaledRMSNorm,
)
from emarecipes.models.families.known import read_shape
from emarecipes.models.families.shape import DecoderShape, LayerShape, Rope

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


@dataclass(frozen=True)
class Adapter:
    """Where LoRA is put, and how; names and meaning are torchtune's."""

    attention: Sequence[str]
    mlp: bool
    output: bool
    rank: int
    alpha: float
    dropout: float
    dora: bool
    quantize_base: bool


def lora_model(
    path: str,
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int | None = None,
) -> Decoder:
    """The decoder that a Hugging Face folder's config.json describes, with LoRA, without weights.

    Families: docs/models.md. A config with it needs no `checkpointer`.

    Args:
        path: The folder.
        lora_attn_modules: Of q_proj, k_proj, v_proj, output_proj.
        apply_lora_to_mlp: LoRA on gate, up and down too.
        apply_lora_to_output: And on the output layer, if it is not the embedding.
        lora_rank: R.
        lora_alpha: The update is lora_alpha / R * B A.
        lora_dropout: Of what A reads.
        use_dora: DoRA in place of LoRA.
        quantize_base: The base in 4 bits (QLoRA).
        max_seq_len: Longest row, which sizes the table of positions; None: config.json's.

    Raises:
        UserError: A family or a field of config.json that is not known, LoRA on a tied output
            layer, DoRA on fused weights.

    Example:
        >>> model = lora_model(
        ...     "models/Qwen3-0.6B", ["q_proj", "v_proj"], lora_rank=16, lora_alpha=32
        ... )
    """
    shape = read_shape(Path(path))
    where = Path(path) / "config.json"
    if max_seq_len is not None:
        if not 1 <= max_seq_len <= shape.max_seq_len:
            raise UserError(
                f"max_seq_len must be from 1 to {shape.max_seq_len}, the most that {where} allows, "
                f"not {max_seq_len}"
            )
        shape = replace(shape, max_seq_len=max_seq_len)
    if apply_lora_to_output and shape.tied:
        raise UserError(
            f"apply_lora_to_output: {where} says tie_word_embeddings: the output layer is the "
            "embedding, and has no place for an adapter"
        )
    if use_dora and shape.fused:
        raise UserError(f"use_dora: {where} is of a {shape.family} model, whose weights are fused")
    adapter = Adapter(
        lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, lora_rank, lora_alpha,
        lora_dropout, use_dora, quantize_base,
    )  # fmt: skip
    return build_decoder(shape, adapter)


def build_decoder(shape: DecoderShape, adapter: Adapter) -> Decoder:
    """A decoder of this shape with random weights, on the default device."""
    embedding: nn.Embedding
    if shape.embedding_scale == 1.0:
        embedding = nn.Embedding(shape.vocabulary, shape.width)
    else:
        embedding = ScaledEmbedding(shape.vocabulary, shape.width, shape.embedding_scale)
    # One table for all layers with the same positions.
    ropes: dict[Rope, HalfRotation] = {}
    for layer in shape.layers:
        if layer.rope is not None and layer.rope not in ropes:
            ropes[layer.rope] = HalfRotation(layer.rope, shape.max_seq_len)
    output: Any = TiedLinear(embedding)
    if not shape.tied:
        output = _linear(
            shape.width, shape.vocabulary, replace(adapter, quantize_base=False), adapter.output
        )
    final = _norm(shape)
    if shape.logit_scale != 1.0:
        final = ScaledRMSNorm(shape.width, shape.norm_eps, shape.logit_scale)
    model = Decoder(
        shape,
        tok_embeddings=embedding,
        layers=nn.ModuleList(_layer(shape, layer, adapter, ropes) for layer in shape.layers),
        norm=final,
        output=output,
    )
    if adapter.quantize_base:
        # As torchtune's builders: weights leave the model in the type of the others.
        _register_reparametrize_state_dict_hooks(model, dtype=embedding.weight.dtype)
    return model


def _layer(
    shape: DecoderShape, layer: LayerShape, adapter: Adapter, ropes: dict[Rope, HalfRotation]
) -> TransformerSelfAttentionLayer:
    norms: dict[str, nn.Module] = {}
    if shape.norms != "after":
        norms |= {"sa_norm": _norm(shape), "mlp_norm": _norm(shape)}
    if shape.norms != "before":
        norms |= {"sa_scale": _norm(shape), "mlp_scale": _norm(shape)}
    elif shape.residual_scale != 1.0:
        norms |= {name: Scale(shape.residual_scale) for name in ("sa_scale", "mlp_scale")}
    return TransformerSelfAttentionLayer(
        _attention(shape, layer, adapter, ropes), _mlp(shape, adapter), **norms
    )


def _attention(
    shape: DecoderShape, layer: LayerShape, adapter: Adapter, ropes: dict[Rope, HalfRotation]
) -> Attention:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    parts: dict[str, nn.Module | None] = {
        name: _linear(shape.width, size, adapter, name in adapter.attention, bias=shape.qkv_bias)
        for name, size in sizes.items()
    }
    parts["output_proj"] = _linear(
        queries,
        shape.width,
        adapter,
        "output_proj" in adapter.attention,
        bias=shape.output_bias,
    )
    if shape.qk_norm is not None:
        whole = shape.qk_norm == "all"
        parts["q_norm"] = _norm(shape, queries if whole else shape.head_dim)
        parts["k_norm"] = _norm(shape, keys if whole else shape.head_dim)
    parts["pos_embeddings"] = None if layer.rope is None else ropes[layer.rope]
    return Attention(shape, layer.window, **parts)


def _mlp(shape: DecoderShape, adapter: Adapter) -> FeedForward:
    def linear(inputs: int, outputs: int) -> nn.Module:
        return _linear(inputs, outputs, adapter, adapter.mlp, bias=shape.mlp_bias)

    return FeedForward(
        gate_proj=linear(shape.width, shape.mlp_width),
        down_proj=linear(shape.mlp_width, shape.width),
        up_proj=linear(shape.width, shape.mlp_width),
        activation=_ACTIVATIONS[shape.activation](),
    )


def _norm(shape: DecoderShape, size: int | None = None) -> nn.Module:
    kind = GemmaRMSNorm if shape.one_plus else RMSNorm
    norm: nn.Module = kind(size or shape.width, eps=shape.norm_eps)
    return norm


def _linear(
    inputs: int, outputs: int, adapter: Adapter, adapted: bool, *, bias: bool = False
) -> nn.Module:
    if adapted:
        kind = DoRALinear if adapter.dora else LoRALinear
        layer: nn.Module = kind(
            inputs,
            outputs,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            use_bias=bias,
            quantize_base=adapter.quantize_base,
        )
        return layer
    if adapter.quantize_base and not bias:
        frozen: nn.Module = FrozenNF4Linear(inputs, outputs, bias=False)
        return frozen
    return nn.Linear(inputs, outputs, bias=bias)
