"""Whether the model that the config builds computes what the checkpoint's config.json describes.

Shapes do not tell: with another rotary base, activation or multiplier it loads and is wrong. Every
field of config.json is compared with the built model, or known to say nothing about the function,
or refused by name: what another architecture adds to a known one is a field not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from emarecipes.errors import UserError
from emarecipes.models._torchtune import final_norm_and_cap
from emarecipes.models._torchtune_convert import read_base_config
from emarecipes.models.families.blocks import Decoder
from emarecipes.models.families.config_json import does_nothing
from emarecipes.models.families.names import CONFIG_JSON

# Families by config.json's model_type.
_FAMILIES = {
    "llama": ("LLAMA2", "LLAMA3", "LLAMA3_2"),
    "mistral": ("MISTRAL",),
    "qwen2": ("QWEN2",),
    "gemma": ("GEMMA",),
    "gemma2": ("GEMMA2",),
    "phi3": ("PHI3_MINI", "PHI4"),
}

# Compared below, by the shapes of the weights, or with the rows (sliding_window).
_COMPARED = {
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "hidden_activation"),
    *("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
}
# Fields of other architectures, and the value with which they do nothing.
_NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

# torchtune's module by the field's value. Gemma 1 was published as "gelu", and computes tanh's.
_TANH = "GELU(approximate='tanh')"
_ACTIVATIONS = {"silu": "SiLU()", "swish": "SiLU()", "gelu_pytorch_tanh": _TANH}
_GEMMA_ACTIVATIONS = _ACTIVATIONS | {"gelu": _TANH}


def check_agreement(base_dir: Path, model: Any, model_type: str) -> None:
    """Compare the built model with the base folder's config.json.

    Args:
        base_dir: The Hugging Face folder that weights are loaded from.
        model: torchtune's decoder, on any device.
        model_type: The checkpointer's.

    Raises:
        UserError: They differ, or a field is not known.
    """
    config = read_base_config(base_dir, model)
    where = base_dir / "config.json"
    if (model_type == CONFIG_JSON) != isinstance(model, Decoder):
        raise UserError(
            f"checkpointer.model_type {CONFIG_JSON} and model emarecipes.models.lora_model belong "
            "together; with lora_model leave `checkpointer` out"
        )
    if model_type == CONFIG_JSON:
        return  # Built of this file, every field of which was read or refused then.
    stated_type = str(config.get("model_type"))
    families = _FAMILIES.get(stated_type)
    if families is None:
        raise UserError(
            f"{where} is of a {stated_type} model, which torchtune's builders do not compute; "
            f"known: {', '.join(_FAMILIES)}"
        )
    if model_type not in families:
        raise UserError(
            f"{where} is of a {stated_type} model: checkpointer.model_type must be "
            f"{' or '.join(families)}, not {model_type}"
        )
    for key, value in config.items():
        if key not in _COMPARED and not does_nothing(key, value, _NEUTRAL):
            raise UserError(
                f"{where}: {key} is {value!r:.60}, and it is not known that the model computes the "
                "same"
            )
    _check_values(where, config, model)
    _check_rope(where, config, model.layers[0].attn.pos_embeddings)
    _check_activation(where, config, model.layers[0].mlp)
    _check_windows(where, config, model)


def sliding_window(base_dir: Path, model: Any) -> int | None:
    """The attention window that config.json states and torchtune's model does not have.

    Rows up to so many tokens are computed the same. None where there is none, or the model has it.
    """
    config = read_base_config(base_dir, model)
    if isinstance(model, Decoder):
        return None
    off = config.get("use_sliding_window") is False
    window = None if off else config.get("sliding_window")
    return window if window and not any(_windows(model)) else None


def _check_values(where: Path, config: Mapping[str, Any], model: Any) -> None:
    norm, cap = final_norm_and_cap(model)
    attention = model.layers[0].attn
    rope = attention.pos_embeddings
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    scaling = getattr(attention, "scaling", None)
    compared = {
        "norm_eps": (getattr(norm, "eps", None), config.get("rms_norm_eps")),
        "rope_base": (getattr(rope, "base", None), config.get("rope_theta", theta)),
        "head_dim": (attention.head_dim, config.get("head_dim")),
        "query_pre_attn_scalar": (
            scaling and scaling**-2,
            config.get("query_pre_attn_scalar"),
        ),
        "final_capping_value": (cap or 0.0, config.get("final_logit_softcapping")),
        "hidden_capping_value": (
            getattr(attention, "softcapping", None) or 0.0,
            config.get("attn_logit_softcapping"),
        ),
    }
    for name, (built, stated) in compared.items():
        if built is not None and stated is not None and abs(built - stated) > 1e-6 * abs(stated):
            raise UserError(f"the model is built with {name} {built:g}, {where} says {stated:g}")
    is_tied = not isinstance(model.output, nn.Module)
    if config.get("tie_word_embeddings", is_tied) != is_tied:
        built = "tied" if is_tied else "untied"
        raise UserError(
            f"the model is built with an output layer that is {built}, {where} says "
            f"tie_word_embeddings {config['tie_word_embeddings']}"
        )


def _check_rope(where: Path, config: Mapping[str, Any], rope: Any) -> None:
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = stated.get("rope_type", stated.get("type", "default"))
    factor = stated.get("factor")
    if kind == "linear" and factor == 1:
        kind = "default"
    part = stated.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "llama3") or part != 1.0:
        what = f"partial_rotary_factor {part}" if part != 1.0 else kind
        raise UserError(
            f"{where}: rotary scaling {what} is not known to torchtune's builders, whose positions "
            "are unscaled or scaled as llama3"
        )
    built: dict[str, Any] = {
        "scale_factor": getattr(rope, "scale_factor", 1.0),
        "low_freq_factor": getattr(rope, "low_freq_factor", None),
        "high_freq_factor": getattr(rope, "high_freq_factor", None),
        "old_context_len": getattr(rope, "old_context_len", None),
    }
    if kind == "default":
        wanted: dict[str, Any] = {"scale_factor": 1.0}
    else:
        wanted = {
            "scale_factor": factor,
            "low_freq_factor": stated.get("low_freq_factor"),
            "high_freq_factor": stated.get("high_freq_factor"),
            "old_context_len": stated.get("original_max_position_embeddings"),
        }
    for name, value in wanted.items():
        if built[name] != value:
            raise UserError(
                f"the model is built with {name} {built[name]}, {where} says {value} ({kind})"
            )


def _check_activation(where: Path, config: Mapping[str, Any], mlp: Any) -> None:
    gemma = str(config["model_type"]).startswith("gemma")
    name = config.get("hidden_activation") or config.get("hidden_act")
    known = _GEMMA_ACTIVATIONS if gemma else _ACTIVATIONS
    built = str(getattr(mlp, "activation", None))
    if name is not None and known.get(str(name)) != built:
        raise UserError(f"the model is built with the activation {built}, {where} says {name}")


def _check_windows(where: Path, config: Mapping[str, Any], model: Any) -> None:
    built = _windows(model)
    if not any(built):
        return  # Compared with the rows, see `sliding_window`.
    types = config.get("layer_types") or [
        "full_attention" if place % 2 else "sliding_attention" for place in range(len(built))
    ]
    stated = [
        config.get("sliding_window") if kind == "sliding_attention" else None for kind in types
    ]
    if stated != built:
        raise UserError(
            f"the model is built with attention windows {built} by layer, {where} says {stated}"
        )


def _windows(model: Any) -> list[int | None]:
    return [getattr(layer.attn, "sliding_window_size", None) for layer in model.layers]
