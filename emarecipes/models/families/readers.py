"""From config.json to a decoder's shape, family by family: what each computes that others do not.

Each raises a UserError where a field says something that is not built here.
"""

from __future__ import annotations

from dataclasses import replace

from emarecipes.models.families.config_json import ConfigJson
from emarecipes.models.families.rope import read_rope
from emarecipes.models.families.shape import DecoderShape, LayerShape, Rope

# Each is built before weights can be compared: a slip would take for ever.
_MOST_LAYERS = 1000
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _shape(c: ConfigJson, family: str, *, activation: str = "hidden_act") -> DecoderShape:
    """What all families have; layers without windows."""
    heads, width = c.size("num_attention_heads"), c.size("hidden_size")
    head_dim = c.size("head_dim", width // heads)
    kv_heads = c.size("num_key_value_heads", heads)
    if heads % kv_heads or width % heads:
        c.refuse("num_attention_heads", f"no multiple of {kv_heads} key-value heads, or of width")
    if c.size("num_hidden_layers") > _MOST_LAYERS:
        c.refuse("num_hidden_layers", "and no model has so many")
    longest = c.size("max_position_embeddings")
    rope = read_rope(c, head_dim, longest, partial=family == "phi3")
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
    if isinstance(first, bool) or not isinstance(first, int | None):
        c.refuse("max_window_layers", "and a whole number is needed")
    if not c.flag("use_sliding_window") or c.get("sliding_window") is None:
        c.get("layer_types")
        return shape
    if first is None:
        first = depth
    return _typed_windows(c, shape, [_SLIDING if i >= first else _FULL for i in range(depth)])


def read_llama(c: ConfigJson) -> DecoderShape:
    """Llama 2 to 3.3, SmolLM2: biases where the file says so."""
    return replace(_biases(c, _shape(c, "llama")), mlp_bias=c.flag("mlp_bias"))


def read_mistral(c: ConfigJson) -> DecoderShape:
    """Llama's, with a sliding window in every layer."""
    shape = _shape(c, "mistral")
    if c.get("sliding_window") is None:
        return shape
    return _windows(shape, [c.size("sliding_window")] * len(shape.layers))


def read_qwen2(c: ConfigJson) -> DecoderShape:
    """Biases on q, k and v; windows in later layers."""
    return _qwen_windows(c, replace(_shape(c, "qwen2"), qkv_bias=True))


def read_qwen3(c: ConfigJson) -> DecoderShape:
    """Norms of each head's q and k."""
    shape = replace(_shape(c, "qwen3"), qk_norm="head")
    return _qwen_windows(c, _biases(c, shape))


def read_smollm3(c: ConfigJson) -> DecoderShape:
    """Every few layers without positions."""
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


def read_gemma(c: ConfigJson) -> DecoderShape:
    """Gemma 1: norms of 1 + w, scaled embeddings."""
    # Published as "gelu", and computes tanh's approximation; some files say so in another field.
    if c.get("hidden_activation") not in (None, *_ACTIVATIONS):
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


def read_gemma2(c: ConfigJson) -> DecoderShape:
    """Soft caps; windows in every other layer."""
    return _later_gemma(c, "gemma2", 2)


def read_gemma3(c: ConfigJson) -> DecoderShape:
    """Norms of q and k; two rotary bases; windows in five of six layers."""
    stated = c.get("_sliding_window_pattern") or c.get("sliding_window_pattern")
    if stated != c.get("sliding_window_pattern"):
        c.refuse("_sliding_window_pattern", "and sliding_window_pattern is not")
    shape = _later_gemma(c, "gemma3_text", c.size("sliding_window_pattern"))
    if shape.attention_cap is not None:
        c.refuse("attn_logit_softcapping", "which Gemma 3 does not compute")
    stated = c.get("rope_parameters")
    if stated and (c.get("rope_scaling") or "full_attention" not in stated):
        c.refuse("rope_parameters", "and Gemma 3's are one entry a kind of layer, or rope_scaling")
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


def read_phi3(c: ConfigJson) -> DecoderShape:
    """Phi-3 and 4: fused projections, rotary positions on a part."""
    shape = replace(_shape(c, "phi3"), fused=True)
    rope = shape.layers[0].rope
    if rope is not None and rope.short_factor is not None:
        # Beyond it, transformers turns the whole row by other factors.
        shape = replace(shape, max_seq_len=c.size("original_max_position_embeddings"))
    if c.get("sliding_window") is None:
        return shape
    return _windows(shape, [c.size("sliding_window")] * len(shape.layers))


def read_olmo2(c: ConfigJson) -> DecoderShape:
    """Norms after each block, and of all q and all k."""
    return replace(_biases(c, _shape(c, "olmo2")), norms="after", qk_norm="all")


def read_granite(c: ConfigJson) -> DecoderShape:
    """Four multipliers."""
    return replace(
        _biases(c, _shape(c, "granite")),
        mlp_bias=c.flag("mlp_bias"),
        attention_scale=c.number("attention_multiplier"),
        embedding_scale=c.number("embedding_multiplier"),
        residual_scale=c.number("residual_multiplier"),
        logit_scale=1.0 / c.number("logits_scaling"),
    )
