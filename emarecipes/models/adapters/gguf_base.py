"""The base model of a LoRA GGUF, from its config.json: names there, sizes, the order of rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emarecipes.errors import UserError
from emarecipes.models.adapters.files import (
    CONFIG,
    WEIGHTS,
    Shapes,
    check_complete,
    check_rank,
)
from emarecipes.models.families.config_json import read_json

# config.json's model_type: llama.cpp's architecture, and whether its converter puts q's and k's
# rows into Meta's order. Those that were run in llama.cpp; see docs/serving.md.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "gemma3": ("gemma3", False),
    "olmo2": ("olmo2", False),
    "phi3": ("phi3", False),
}
# Where a model of text and images has the text's layers.
_LAYERS = {"gemma3": "model.language_model.layers."}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Fused in Phi-3, in the same order there.
_FUSED_PARTS = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Of these an absent head_dim is hidden_size / num_attention_heads.
_EVEN_HEADS = ("llama", "mistral", "qwen2", "olmo2", "phi3")


def base_config(folder: Path, config: dict[str, Any], base: Path | None) -> dict[str, Any]:
    """The base's config.json, of `base` or of the folder that the adapter's config names.

    Raises:
        UserError: It is not there, or of a family that is not known here.
    """
    given = config.get("base_model_name_or_path")
    if base is None and not (given and (Path(str(given)) / "config.json").is_file()):
        raise UserError(
            f"{folder / CONFIG}: its base {given!r} is no folder with a config.json here, which "
            "the order of q's and k's rows depends on; say --base DIR"
        )
    named = base or Path(str(given))
    model = read_json(named)
    kind = model.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{named / 'config.json'}: model_type is {kind}, and how llama.cpp orders its weights "
            f"is not known here; known: {', '.join(ARCHITECTURES)}"
        )
    return model


def gguf_name(folder: Path, name: str, model: dict[str, Any]) -> str:
    """What llama.cpp calls a Hugging Face module.

    Raises:
        UserError: It has no name for it.
    """
    if name == "lm_head" and not _is_tied(model):
        return "output"
    head, _, rest = name.partition(_prefix(model))
    layer, _, part = rest.partition(".")
    known = _PARTS | _FUSED_PARTS
    if head or not layer.isdecimal() or part not in known:
        why = " (tied to the embedding)" if name == "lm_head" else ""
        raise UserError(
            f"{folder / WEIGHTS}: it adapts {name}{why}, for which a LoRA GGUF has no form known "
            "here"
        )
    return f"blk.{layer}.{known[part]}"


def check_shapes(
    folder: Path, config: dict[str, Any], shapes: dict[str, Shapes], model: dict[str, Any]
) -> None:
    """Check that an adapter is whole and of this base, as far as config.json tells sizes.

    Raises:
        UserError: A layer that the adapter's config names is lacking; a rank is not the one that it
            states; a matrix is not of the base's size, or of a layer that the base has not.
    """
    sizes = _sizes(model, shapes)
    for name, parts in shapes.items():
        rank, columns = parts["a"]
        rows = parts["b"][0]
        check_rank(folder, config, name, rank)
        if name not in sizes:
            raise UserError(f"{folder}: an adapter of another base, which has no {name}")
        given = [one or own for one, own in zip(sizes[name], (rows, columns), strict=True)]
        if given != [rows, columns]:
            raise UserError(
                f"{folder}: an adapter of another base: {name} is for {rows} x {columns}, the base "
                f"has {given[0]} x {given[1]}"
            )
    check_complete(folder, config, shapes, sizes)


def head_size(model: dict[str, Any]) -> int | None:
    """Numbers of a head; None where config.json leaves it to its family's default."""
    given = model.get("head_dim")
    if given is None and model["model_type"] in _EVEN_HEADS and model.get("hidden_size"):
        return int(model["hidden_size"]) // int(model["num_attention_heads"])
    return given


def _sizes(
    model: dict[str, Any], adapted: Iterable[str]
) -> dict[str, tuple[int | None, int | None]]:
    """(rows, columns) of every linear module, by its Hugging Face name; None where not told.

    Where the number of layers is not told, it is that of the adapted ones.
    """
    prefix = _prefix(model)
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in adapted)
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    text = model | model.get("text_config", {}) | {"model_type": model["model_type"]}
    heads, width, inner = (
        text.get(key) for key in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    kv_heads, head = text.get("num_key_value_heads") or heads, head_size(text)
    q, kv = (head and count and head * count for count in (heads, kv_heads))
    of_part = {
        "q_proj": (q, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (width, q),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
        "qkv_proj": (q and kv and q + 2 * kv, width),
        "gate_up_proj": (inner and 2 * inner, width),
    }
    parts = _FUSED_PARTS if model["model_type"] == "phi3" else _PARTS
    found: dict[str, tuple[int | None, int | None]] = {
        f"{prefix}{layer}.{part}": of_part[part.rpartition(".")[2]]
        for layer in range(text.get("num_hidden_layers") or last + 1)
        for part in parts
    }
    return found | ({} if _is_tied(model) else {"lm_head": (text.get("vocab_size"), width)})


def _prefix(model: dict[str, Any]) -> str:
    return _LAYERS.get(model["model_type"], "model.layers.")


def _is_tied(model: dict[str, Any]) -> bool:
    # Gemma's files leave it out where it is so.
    return bool(model.get("tie_word_embeddings", model["model_type"].startswith("gemma")))
