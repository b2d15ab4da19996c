"""The metadata of a GGUF file as a config.json: what it does not say exactly is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Below the architecture's name. Any other that is set may change the computation.
_KNOWN = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "rope.dimension_count"),
        *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
    }
)
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3_CONTEXT = 8192


def model_config(
    meta: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Return the fields of config.json.

    Args:
        meta: The file's metadata, by their keys.
        shapes: Of its tensors, by their names there; rows first.
        rope_factors: What the tensor ``rope_freqs.weight`` holds: each rotation's wavelength over
            the unscaled one, (head_dim / 2,).

    Raises:
        ValueError: An architecture, key, or kind of positions that is not known.
        KeyError: A key that is needed is not there.
    """
    kind = meta["general.architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture is {kind}; only {' and '.join(ARCHITECTURES)} can be prepared"
        )
    if meta.get("split.count", 1) > 1:
        raise ValueError(
            f"is one of {meta['split.count']} files (split.count); join them with "
            "`llama-gguf-split --merge` first"
        )
    own = {key: value for key, value in meta.items() if key.startswith(f"{kind}.")}
    for key, value in own.items():
        if key.removeprefix(f"{kind}.") not in _KNOWN and value:
            raise ValueError(f"{key} is {value}, and what it changes is not known here")
    heads = _whole(own, f"{kind}.attention.head_count")
    width = _whole(own, f"{kind}.embedding_length")
    head_dim = own.get(f"{kind}.attention.key_length", width // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(f"{kind}.{key}", head_dim) != head_dim:
            raise ValueError(f"{kind}.{key} is {own[f'{kind}.{key}']}, not a head's {head_dim}")
    kv = f"{kind}.attention.head_count_kv"
    base = float(own.get(f"{kind}.rope.freq_base", 10000.0))
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "attention_dropout": 0.0,
        **token_ids(meta),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": _whole(own, f"{kind}.feed_forward_length"),
        "max_position_embeddings": _whole(own, f"{kind}.context_length"),
        "model_type": kind,
        "num_attention_heads": heads,
        "num_hidden_layers": _whole(own, f"{kind}.block_count"),
        "num_key_value_heads": _whole({kv: heads} | own, kv),
        # GGUF keeps the fp32 neighbour of 1e-05.
        "rms_norm_eps": float(f"{own[f'{kind}.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": _rope_scaling(own, kind, base, head_dim, rope_factors),
        "rope_theta": base,
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shapes["token_embd.weight"][0],
    }
    return config | (_llama_biases(shapes) if kind == "llama" else _qwen2(config))


def token_ids(meta: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the ids of the beginning, end and padding tokens; None for one that is not named."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{k}_token_id": meta.get(f"tokenizer.ggml.{v}_token_id") for k, v in names.items()}


def _whole(own: Mapping[str, Any], key: str) -> int:
    value = own[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value}, not one whole number for all layers")
    return value


def _llama_biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Which linear layers have biases; Hugging Face's Llama has all of a block's or none."""
    found = {}
    parts = {
        "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
    }
    for field, names in parts.items():
        there = [f"blk.0.{name}.bias" in shapes for name in names]
        if any(there) and not all(there):
            raise ValueError(f"has biases on some of {', '.join(names)} alone")
        found[field] = all(there)
    return found


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError(f"has heads of {config['head_dim']}, which Qwen2 has not")
    return {"use_sliding_window": False}


def _rope_scaling(
    own: Mapping[str, Any], kind: str, base: float, head_dim: int, factors: NDArray[Any] | None
) -> dict[str, Any] | None:
    """Return how positions are scaled: not, by one number, or by Llama 3's rule."""
    scaling = own.get(f"{kind}.rope.scaling.type", "none")
    if factors is not None:
        if scaling != "none":
            raise ValueError(f"has both rope_freqs.weight and {kind}.rope.scaling.type {scaling}")
        factor = float(round(float(np.max(factors))))
        if not np.allclose(factors, llama_3_factors(base, head_dim, factor), rtol=1e-5):
            raise ValueError("rope_freqs.weight is not Llama 3's scaling of positions")
        original = {"original_max_position_embeddings": _LLAMA_3_CONTEXT}
        return {"rope_type": "llama3", "factor": factor, **_LLAMA_3, **original}
    if scaling == "linear":
        factor = float(own[f"{kind}.rope.scaling.factor"])
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if scaling != "none":
        raise ValueError(f"{kind}.rope.scaling.type is {scaling}; only none and linear are known")
    return None


def llama_3_factors(base: float, head_dim: int, factor: float) -> NDArray[Any]:
    """By what Llama 3.1 divides each frequency: 1 for short waves, ``factor`` for long ones.

    Between a quarter of the original context and all of it, waves are blended by their number in
    it, ``c`` from 1 to 4: 1 / ((1 - s) / factor + s) with s = (c - 1) / 3.

    Returns:
        (head_dim / 2,)
    """
    waves = 2 * np.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = _LLAMA_3.values()
    share = np.clip((_LLAMA_3_CONTEXT / waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - share) / factor + share)
