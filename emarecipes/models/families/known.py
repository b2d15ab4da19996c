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
from emarecipes.models.families.readers import (
    read_gemma,
    read_gemma2,
    read_gemma3,
    read_granite,
    read_llama,
    read_mistral,
    read_olmo2,
    read_phi3,
    read_qwen2,
    read_qwen3,
    read_smollm3,
)
from emarecipes.models.families.shape import DecoderShape

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

_Reader = Callable[[ConfigJson], DecoderShape]
# By config.json's model_type: how it is read, and its class's defaults.
FAMILIES: dict[str, tuple[_Reader, Mapping[str, Any]]] = {
    "llama": (read_llama, _COMMON | {"max_position_embeddings": 2048}),
    "mistral": (
        read_mistral,
        _COMMON
        | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "qwen2": (read_qwen2, _QWEN),
    "qwen3": (read_qwen3, _QWEN | {"head_dim": 128}),
    "smollm3": (
        read_smollm3,
        _COMMON
        | {"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4}
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    ),
    "gemma": (
        read_gemma,
        _GEMMA
        | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16}
        | {"max_position_embeddings": 8192},
    ),
    "gemma2": (
        read_gemma2,
        _GEMMA
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"num_key_value_heads": 4, "max_position_embeddings": 8192},
    ),
    "gemma3_text": (
        read_gemma3,
        _GEMMA
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "vocab_size": 262_208}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window_pattern": 6}
        | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"max_position_embeddings": 131_072},
    ),
    "phi3": (
        read_phi3,
        _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "olmo2": (read_olmo2, _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
    "granite": (
        read_granite,
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
    if not isinstance(kind, str):
        kind = None if kind is None else repr(kind)  # A list is in no mapping.
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
