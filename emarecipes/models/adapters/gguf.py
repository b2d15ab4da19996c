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
from emarecipes.models.adapters.base_copies import base_copies
from emarecipes.models.adapters.files import (
    WEIGHTS,
    adapter_scale,
    read_adapter_config,
    read_shapes,
    read_tensors,
)
from emarecipes.models.adapters.gguf_base import (
    ARCHITECTURES,
    base_config,
    check_shapes,
    gguf_name,
    head_size,
)

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
            a family or with layers that are not known here, or of other shapes; an adapter that
            lacks layers or has numbers that are not finite; `output` exists.
    """
    config = read_adapter_config(folder)
    shapes = read_shapes(folder)
    if config.get("use_dora") or any("magnitude" in parts for parts in shapes.values()):
        raise UserError(
            f"{folder}: a DoRA adapter, for which a LoRA GGUF has no form; merge it "
            "(save_merged: true) and convert the merged model"
        )
    if copies := list(base_copies(folder)):
        raise UserError(
            f"{folder / WEIGHTS}: it holds a copy of the base's {copies[0]}, for which a LoRA "
            "GGUF has no form; save the adapter from PEFT with save_embedding_layers=False"
        )
    for name, parts in shapes.items():
        if set(parts) != {"a", "b"} or parts["a"][:1] != parts["b"][1:]:
            raise UserError(f"{folder / WEIGHTS}: {name} lacks a whole pair of lora_A and lora_B")
    model = base_config(folder, config, base)
    kind, permuted = ARCHITECTURES[model["model_type"]]
    names = {name: gguf_name(folder, name, model) for name in shapes}
    check_shapes(folder, config, shapes, model)
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
                b = _permuted(b, model, heads)
            if not (b.isfinite().all() and parts["a"].isfinite().all()):
                raise UserError(f"{folder / WEIGHTS}: {name} has a number that is not finite")
            yield f"{names[name]}.weight.lora_a", parts["a"].float().contiguous().numpy()
            yield f"{names[name]}.weight.lora_b", b.float().contiguous().numpy()

    with whole(output) as path:
        _write(path, kind, alpha, tensors())


def _permuted(b: Tensor, model: dict[str, Any], key: str) -> Tensor:
    """Order each head's rows for a rotation of pairs, from an order for one of halves.

    The inverse of what `emarecipes.models.prepare.gguf` does to a weight: row (half, i) of a head
    becomes row (i, half).
    """
    heads, head = model.get(key) or model["num_attention_heads"], head_size(model)
    assert head is not None
    return b.reshape(heads, 2, head // 2, -1).transpose(1, 2).reshape(b.shape)


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
