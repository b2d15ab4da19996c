"""The known families: what each one's config.json says, and what it leaves to the family.

Defaults are those of transformers' config classes, for files that leave them out (Gemma 3's do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from emarecipes.errors import UserError
from emarecipes.models.families.config_json import ConfigJson, read_json
from emarecipes.models.families.rope import read_rope
from emarecipes.models.families.shape import DecoderShape, LayerShape, Rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = _COMMON | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}


def _shape(c: ConfigJson, family: str, *, activation: str = "hidden_act") -> DecoderShape:
    """What all families have; layers without windows."""
    heads, width = c.size("num_attention_heads"), c.size("hidden_size")
    head_dim = c.size("head_dim", width // heads)
    kv_heads = c.size("num_key_value_heads", heads)
    if heads % kv_heads or width % heads:
        c.refuse("num_attention_heads", f"no multiple of {kv_heads} key-value heads, or of width")
    longest = c.size("max_position_embeddings")
    rope = read_rope(c, head_dim, longest)
    return DecoderShape(
        family=family,
        vocabulary=c.size("vocab_size"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=c.size("intermediate_size"),
        max_seq_len=longest,
        layers=(LayerShape(None, rope),) * c.size("num_hidden_layers"),
        activation=c.one_of(activation, _ACTIVATIONS),
        norm_eps=c.number("rms_norm_eps"),
        attention_scale=head_dim**-0.5,
        tied=c.flag("tie_word_embeddings"),
    )


def _biases(c: ConfigJson, shape: DecoderShape) -> DecoderShape:
    bias = c.flag("attention_bias")
    return replace(shape, qkv_bias=bias, output_bias=bias)


def _windows(shape: DecoderShape, windows: list[int | None]) -> DecoderShape:
    layers = zip(shape.layers, windows, strict=True)
    return replace(shape, layers=tuple(replace(layer, window=size) for layer, size in layers))


def _typed_windows(c: ConfigJson, shape: DecoderShape, otherwise: list[str]) -> DecoderShape:
    """Windows on the layers that `layer_types`, or else `otherwise`, call sliding."""
    types = c.entries("layer_types", len(shape.layers), (_FULL, _SLIDING)) or otherwise
    if _SLIDING not in types:
        c.get("sliding_window")
        return shape
    size = c.size("sliding_window")
    return _windows(shape, [size if kind == _SLIDING else None for kind in types])


def _qwen_windows(c: ConfigJson, shape: DecoderShape) -> DecoderShape:
    depth = len(shape.layers)
    first = c.get("max_window_layers")
    if not c.flag("use_sliding_window") or c.get("sliding_window") is None:
        c.get("layer_types")
        return shape
    return _typed_windows(c, shape, [_SLIDING if i >= first else _FULL for i in range(depth)])


def _llama(c: ConfigJson) -> DecoderShape:
    return replace(_biases(c, _shape(c, "llama")), mlp_bias=c.flag("mlp_bias"))


def _mistral(c: ConfigJson) -> DecoderShape:
    shape = _shape(c, "mistral")
    if c.get("sliding_window") is None:
        return shape
    return _windows(shape, [c.size("sliding_window")] * len(shape.layers))


def _qwen2(c: ConfigJson) -> DecoderShape:
    return _qwen_windows(c, replace(_shape(c, "qwen2"), qkv_bias=True))


def _qwen3(c: ConfigJson) -> DecoderShape:
    shape = replace(_shape(c, "qwen3"), qk_norm="head")
    return _qwen_windows(c, _biases(c, shape))


def _smollm3(c: ConfigJson) -> DecoderShape:
    shape = replace(_biases(c, _shape(c, "smollm3")), mlp_bias=c.flag("mlp_bias"))
    depth, every = len(shape.layers), c.size("no_rope_layer_interval")
    turns = c.entries("no_rope_layers", depth, (0, 1)) or [(i + 1) % every for i in range(depth)]
    layers = zip(shape.layers, turns, strict=True)
    shape = replace(
        shape, layers=tuple(layer if on else replace(layer, rope=None) for layer, on in layers)
    )
    c.get("max_window_layers")
    if not c.flag("use_sliding_window") or c.get("sliding_window") is None:
        c.get("layer_types")
        return shape
    return _typed_windows(c, shape, [_FULL if on else _SLIDING for on in turns])


def _gemma(c: ConfigJson) -> DecoderShape:
    # Published as "gelu", and computes tanh's approximation; some files say so in another field.
    if (c.get("hidden_activation") or "gelu_pytorch_tanh") not in _ACTIVATIONS:
        c.refuse("hidden_activation", "and Gemma's is gelu_pytorch_tanh")
    shape = _gemma_shape(c, "gemma", "hidden_act")
    if shape.activation == "silu":
        c.refuse("hidden_act", "and Gemma's is gelu_pytorch_tanh")
    return replace(shape, activation="gelu_tanh")


def _gemma_shape(c: ConfigJson, family: str, activation: str) -> DecoderShape:
    shape = _biases(c, _shape(c, family, activation=activation))
    return replace(shape, one_plus=True, embedding_scale=shape.width**0.5)


def _later_gemma(c: ConfigJson, family: str, pattern: int) -> DecoderShape:
    """Gemma 2 and 3: norms before and after, a query scale of its own, caps, windows."""
    if c.get("hidden_act") not in (None, c.get("hidden_activation")):
        c.refuse("hidden_act", f"and hidden_activation {c.get('hidden_activation')}")
    shape = replace(
        _gemma_shape(c, family, "hidden_activation"),
        norms="both",
        attention_scale=c.number("query_pre_attn_scalar") ** -0.5,
        attention_cap=c.cap("attn_logit_softcapping"),
        logit_cap=c.cap("final_logit_softcapping"),
    )
    depth = len(shape.layers)
    return _typed_windows(
        c, shape, [_SLIDING if (i + 1) % pattern else _FULL for i in range(depth)]
    )


def _gemma2(c: ConfigJson) -> DecoderShape:
    return _later_gemma(c, "gemma2", 2)


def _gemma3(c: ConfigJson) -> DecoderShape:
    stated = c.get("_sliding_window_pattern") or c.get("sliding_window_pattern")
    if stated != c.get("sliding_window_pattern"):
        c.refuse("_sliding_window_pattern", "and sliding_window_pattern is not")
    shape = _later_gemma(c, "gemma3_text", c.size("sliding_window_pattern"))
    # Layers with a window have rotary positions of their own, never scaled.
    local = _gemma3_local_rope(c, shape.head_dim)
    layers = [
        layer if layer.window is None else replace(layer, rope=local) for layer in shape.layers
    ]
    return replace(shape, qk_norm="head", layers=tuple(layers))


def _gemma3_local_rope(c: ConfigJson, head_dim: int) -> Rope:
    base = c.number("rope_local_base_freq")
    part = c.part("rope_parameters").part(_SLIDING)
    if part.get("rope_type") not in (None, "default"):
        part.refuse("rope_type", "and Gemma 3's windows have unscaled positions")
    stated = part.get("rope_theta")
    part.check_all_read()
    return Rope(head_dim, base if stated is None else part.number("rope_theta"))


def _phi3(c: ConfigJson) -> DecoderShape:
    shape = replace(_shape(c, "phi3"), fused=True)
    rope = shape.layers[0].rope
    if rope is not None and rope.short_factor is not None:
        # Beyond it, transformers turns the whole row by other factors.
        shape = replace(shape, max_seq_len=c.size("original_max_position_embeddings"))
    if c.get("sliding_window") is None:
        return shape
    return _windows(shape, [c.size("sliding_window")] * len(shape.layers))


def _olmo2(c: ConfigJson) -> DecoderShape:
    return replace(_biases(c, _shape(c, "olmo2")), norms="after", qk_norm="all")


def _granite(c: ConfigJson) -> DecoderShape:
    return replace(
        _biases(c, _shape(c, "granite")),
        mlp_bias=c.flag("mlp_bias"),
        attention_scale=c.number("attention_multiplier"),
        embedding_scale=c.number("embedding_multiplier"),
        residual_scale=c.number("residual_multiplier"),
        logit_scale=1.0 / c.number("logits_scaling"),
    )


_Reader = Callable[[ConfigJson], DecoderShape]
# By config.json's model_type: how it is read, and its class's defaults.
FAMILIES: dict[str, tuple[_Reader, Mapping[str, Any]]] = {
    "llama": (_llama, _COMMON | {"max_position_embeddings": 2048}),
    "mistral": (
        _mistral,
        _COMMON
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "qwen2": (_qwen2, _QWEN),
    "qwen3": (_qwen3, _QWEN | {"head_dim": 128}),
    "smollm3": (
        _smollm3,
        _COMMON
        | {"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4}
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    ),
    "gemma": (
        _gemma,
        _GEMMA
        | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16}
        | {"max_position_embeddings": 8192},
    ),
    "gemma2": (
        _gemma2,
        _GEMMA
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"num_key_value_heads": 4, "max_position_embeddings": 8192},
    ),
    "gemma3_text": (
        _gemma3,
        _GEMMA
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "vocab_size": 262_208}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window_pattern": 6}
        | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"max_position_embeddings": 131_072},
    ),
    "phi3": (
        _phi3,
        _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "olmo2": (_olmo2, _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
    "granite": (
        _granite,
        _COMMON
        | {"attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
        | {"logits_scaling": 1.0, "max_position_embeddings": 2048},
    ),
}

# Fields of other architectures, or of code that came with a model, and the value with which they
# do nothing.
_NEUTRAL: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
# A model of text and images: the field that decides, and what beside the text is left alone.
_WITH_VISION = {"gemma3": "gemma3_text"}
VISION_PREFIXES = ("model.vision_tower.", "model.multi_modal_projector.")
_VISION_FIELDS = {
    *("model_type", "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index"),
    *("eoi_token_index", "image_token_index", "tie_word_embeddings"),
}


def read_shape(folder: Path) -> DecoderShape:
    """What the model in a folder computes, from its config.json alone.

    Raises:
        UserError: No config.json; a family, or a field that is set, that is not known.
    """
    return shape_of(read_json(folder), str(folder / "config.json"))


def shape_of(config: Mapping[str, Any], where: str) -> DecoderShape:
    """`read_shape` of what was read already.

    Args:
        config: config.json's fields.
        where: The file, for messages.
    """
    kind = config.get("model_type")
    if kind in _WITH_VISION:
        return _text_of(ConfigJson(where, config), _WITH_VISION[kind])
    if kind not in FAMILIES:
        known = ", ".join([*FAMILIES, *_WITH_VISION])
        raise UserError(f"{where}: model_type {kind!r:.60} is not known; known: {known}")
    read, defaults = FAMILIES[kind]
    c = ConfigJson(where, config, defaults)
    c.get("model_type")
    shape = read(c)
    c.check_all_read(_NEUTRAL)
    return shape


def _text_of(c: ConfigJson, family: str) -> DecoderShape:
    for field in _VISION_FIELDS:
        c.get(field)
    c.check_all_read()
    text = c.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type", family) != family:
        c.refuse("text_config", f"and {family}'s is needed")
    text = {"model_type": family} | dict(text)
    if c.get("tie_word_embeddings") is not None:
        text = {"tie_word_embeddings": c.get("tie_word_embeddings")} | text
    shape = shape_of(text, f"{c.where}: text_config")
    return replace(shape, prefix="model.language_model.")
