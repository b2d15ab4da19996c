"""A PEFT adapter as llama.cpp reads it: a LoRA GGUF.

The update of each matrix is alpha / r * B A there as well, with one alpha for the whole file and r
the rank of that matrix; there is no rank-stabilised form. Names and the order of q's and k's rows
are those of the base model's own GGUF file.

Shapes: r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emarecipes.errors import UserError
from emarecipes.files import whole
from emarecipes.models.adapters.files import (
    CONFIG,
    WEIGHTS,
    adapter_scale,
    read_adapter_config,
    read_shapes,
    read_tensors,
)
from emarecipes.models.families.config_json import read_json

# config.json's model_type: llama.cpp's architecture, and whether its converter puts q's and k's
# rows into Meta's order. Those that were run in llama.cpp; see docs/serving.md.
_ARCHITECTURES = {
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
    # Fused in Phi-3, in the same order there.
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def save_gguf(folder: Path, output: Path, base: Path | None = None) -> None:
    """Write the adapter of `folder` as a LoRA GGUF, in fp32.

    A rank-stabilised adapter, or one with ranks and alphas of their own, keeps every layer's scale:
    alpha is r times the scale that most layers have, and B takes what remains of the others'.

    Args:
        folder: Of PEFT's files.
        output: The file, which must not be there yet.
        base: The base model's folder, for its config.json; else what the adapter's config names.

    Raises:
        UserError: What is no plain or rank-stabilised LoRA: DoRA, biases, whole modules; a base of
            a family or with layers that are not known here, or of other shapes; `output` exists.
    """
    config = read_adapter_config(folder)
    shapes = read_shapes(folder)
    if config.get("use_dora") or any("magnitude" in parts for parts in shapes.values()):
        raise UserError(
            f"{folder}: a DoRA adapter, for which a LoRA GGUF has no form; merge it "
            "(save_merged: true) and convert the merged model"
        )
    for name, parts in shapes.items():
        if set(parts) != {"a", "b"} or parts["a"][:1] != parts["b"][1:]:
            raise UserError(f"{folder / WEIGHTS}: {name} lacks a whole pair of lora_A and lora_B")
    model = _base_config(folder, config, base)
    kind, permuted = _ARCHITECTURES[model["model_type"]]
    names = {name: _gguf_name(folder, name, model) for name in shapes}
    ranks = {name: parts["a"][0] for name, parts in shapes.items()}
    alphas = {name: adapter_scale(config, name, ranks[name]) * ranks[name] for name in shapes}
    alpha = float(np.float32(max(alphas.values(), key=list(alphas.values()).count)))
    if output.exists():
        raise UserError(f"{output}: exists; remove it, or choose another --output")

    def tensors() -> Iterator[tuple[str, NDArray[Any]]]:
        for name, parts in read_tensors(folder).items():
            b = parts["b"].double() * (alphas[name] / alpha)
            heads = _HEADS.get(names[name].rpartition(".")[2]) if permuted else None
            if heads is not None:
                b = _permuted(folder, name, b, model, heads)
            yield f"{names[name]}.weight.lora_a", parts["a"].float().contiguous().numpy()
            yield f"{names[name]}.weight.lora_b", b.float().contiguous().numpy()

    with whole(output) as path:
        _write(path, kind, alpha, tensors())


def _base_config(folder: Path, config: dict[str, Any], base: Path | None) -> dict[str, Any]:
    given = config.get("base_model_name_or_path")
    if base is None and not (given and (Path(str(given)) / "config.json").is_file()):
        raise UserError(
            f"{folder / CONFIG}: its base {given!r} is no folder with a config.json here, which "
            "the order of q's and k's rows depends on; say --base DIR"
        )
    named = base or Path(str(given))
    model = read_json(named)
    kind = model.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{named / 'config.json'}: model_type is {kind}, and how llama.cpp orders its weights "
            f"is not known here; known: {', '.join(_ARCHITECTURES)}"
        )
    return model


def _gguf_name(folder: Path, name: str, model: dict[str, Any]) -> str:
    """What llama.cpp calls a Hugging Face module."""
    kind = model["model_type"]
    # Gemma's files leave it out where it is so.
    if name == "lm_head" and not model.get("tie_word_embeddings", kind.startswith("gemma")):
        return "output"
    head, _, rest = name.partition(_LAYERS.get(kind, "model.layers."))
    layer, _, part = rest.partition(".")
    if head or not layer.isdecimal() or part not in _PARTS:
        why = " (tied to the embedding)" if name == "lm_head" else ""
        raise UserError(
            f"{folder / WEIGHTS}: it adapts {name}{why}, for which a LoRA GGUF has no form known "
            "here"
        )
    return f"blk.{layer}.{_PARTS[part]}"


def _permuted(folder: Path, name: str, b: Tensor, model: dict[str, Any], key: str) -> Tensor:
    """Order each head's rows for a rotation of pairs, from an order for one of halves.

    The inverse of what `emarecipes.models.prepare.gguf` does to a weight: row (half, i) of a head
    becomes row (i, half).
    """
    heads = model.get(key) or model["num_attention_heads"]
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    if b.shape[0] != heads * head_dim:
        raise UserError(
            f"{folder}: an adapter of another base: {name} has {b.shape[0]} rows, the base "
            f"{heads} heads of {head_dim}"
        )
    return b.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(b.shape)


def _write(
    path: Path, kind: str, alpha: float, tensors: Iterator[tuple[str, NDArray[Any]]]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
