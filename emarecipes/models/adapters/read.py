"""Reads a PEFT adapter folder into the LoRA modules of a torchtune model.

The inverse of `emarecipes.models.adapters.export.save_adapter`. Several adapters can take turns on
one loaded model: what the next one does not set is put back to no effect.

Shapes: r rank of the adapter, R rank of the model's LoRA modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear

from emarecipes.errors import UserError
from emarecipes.models.adapters.base_copies import check_base_copies
from emarecipes.models.adapters.files import (
    WEIGHTS,
    Shapes,
    Tensors,
    adapter_scale,
    check_complete,
    check_rank,
    read_adapter_config,
    read_shapes,
    read_tensors,
)
from emarecipes.models.adapters.layout import (
    ModuleRows,
    adapter_modules,
    linear_modules,
    plain_module,
)
from emarecipes.models.source import ModelSource
from emarecipes.weights_folder import WeightsFolder


@dataclass(frozen=True)
class LoadedLayer:
    """One layer's adapter in torchtune's layout: the update is scale * b a.

    Attributes:
        a: (r, in).
        b: (out, r).
        scale: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised.
        magnitude: (out,) for DoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


def check_adapter(folder: Path, source: ModelSource) -> None:
    """Check that an adapter belongs on a model, from the headers of its files alone.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        source: The model with LoRA, and the folder of its base weights.

    Raises:
        UserError: Files are missing or broken; it is no LoRA or DoRA adapter; it was trained on a
            base of other shapes, or adapts modules or shapes that the model's LoRA does not have;
            its rank is larger than the model's; it lacks layers that its config names.
    """
    config = read_adapter_config(folder)
    modules = _by_hf_name(source.meta_model, source)
    _check_base(folder, config, modules)
    lora = _lora_modules(source.meta_model)
    stored = read_shapes(folder)
    linear = linear_modules(source.meta_model, source.model_type, source.checkpoint_dir)
    for name, shapes in stored.items():
        if name not in modules:
            raise UserError(
                f"{folder}: it adapts {name}, where the model has no LoRA; it is of another base, "
                "or model.lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output name too few"
            )
        parts = modules[name]
        _check_shapes(folder, config, name, shapes, next(iter(parts.values())))
        is_fused = _is_fused(parts)
        rank = _block(shapes["a"][0], config) if is_fused else shapes["a"][0]
        for part in parts:
            held = lora[part].lora_a.out_features
            if rank > held:
                raise UserError(
                    f"{folder}: its rank is {rank}, the model's {held}; "
                    f"set model.lora_rank to at least {rank}"
                )
            if bool(config.get("use_dora")) != ("magnitude" in shapes):
                has = "has" if "magnitude" in shapes else "lacks"
                raise UserError(
                    f"{folder}: use_dora is {config.get('use_dora')}, and {name} {has} a magnitude"
                )
            if "magnitude" in shapes and (is_fused or not isinstance(lora[part], DoRALinear)):
                hint = "no form for it on fused layers" if is_fused else "set model.use_dora: true"
                raise UserError(f"{folder}: a DoRA adapter; {hint}")
    check_complete(folder, config, stored, linear)
    check_base_copies(folder, source.checkpoint_dir)


def load_adapter(model: nn.Module, folder: Path, source: ModelSource) -> None:
    """Put an adapter into the LoRA modules of a model, in place of any that is there.

    The same as `set_adapter(model, read_adapter(model, folder, source))`.

    Args:
        model: torchtune's model with LoRA or DoRA, not sharded.
        folder: The adapter, see `check_adapter`.
        source: Where the model's base comes from.

    Raises:
        UserError: See `check_adapter` and `read_adapter`.
    """
    set_adapter(model, read_adapter(model, folder, source))


def read_adapter(model: nn.Module, folder: Path, source: ModelSource) -> dict[str, LoadedLayer]:
    """Read an adapter on the CPU, its rows in torchtune's order, by torchtune's module names.

    Where the base's weights are fused (Phi-3), a part takes those ranks of the fused adapter that
    act on it; `save_adapter` writes each part's as a block of its own.

    Raises:
        UserError: See `check_adapter`; a fused adapter that acts on parts without LoRA, or with
            more ranks on one part than the model has.
    """
    check_adapter(folder, replace(source, meta_model=model))
    config = read_adapter_config(folder)
    lora = _lora_modules(model)
    modules = _by_hf_name(model, source)
    layers: dict[str, LoadedLayer] = {}
    for name, tensors in read_tensors(folder).items():
        parts = modules[name]
        scale = adapter_scale(config, name, tensors["a"].shape[0])
        if not _is_fused(parts):
            ((part, rows),) = parts.items()
            layers[part] = _rows_of(rows, tensors, scale)
            continue
        _check_covered(folder, name, parts, tensors["b"])
        for part, rows in parts.items():
            layer = _used_blocks(_rows_of(rows, tensors, scale), config)
            held = lora[part].lora_a.out_features
            if layer.a.shape[0] > held:
                raise UserError(
                    f"{folder}: {name} is one adapter over fused layers, of rank "
                    f"{layer.a.shape[0]}; set model.lora_rank to at least that, not {held}"
                )
            layers[part] = layer
    return layers


@torch.no_grad()
def set_adapter(model: nn.Module, layers: Mapping[str, LoadedLayer]) -> None:
    """Write an adapter's layers into the model's LoRA modules, corrected to the model's scale.

    B becomes B * (adapter's scale) / (alpha / R); ranks beyond the adapter's are zero. Modules that
    the adapter lacks get B = 0, and a DoRA module without a magnitude gets the one of no effect,
    ||W + s B A|| by row.

    Args:
        model: torchtune's model with LoRA or DoRA, not sharded.
        layers: From `read_adapter` on a model of the same structure.
    """
    for name, module in _lora_modules(model).items():
        layer = layers.get(name)
        a, b = module.lora_a.weight, module.lora_b.weight
        b.zero_()
        if layer is not None:
            rank = layer.a.shape[0]
            a.zero_()
            a[:rank].copy_(layer.a)
            factor = layer.scale / module_scale(module)
            b[:, :rank].copy_(layer.b if factor == 1.0 else layer.b.float() * factor)
        if isinstance(module, DoRALinear):
            if layer is not None and layer.magnitude is not None:
                module.magnitude.copy_(layer.magnitude)
            else:
                module.initialize_dora_magnitude()


def _check_base(
    folder: Path, config: dict[str, Any], modules: dict[str, dict[str, ModuleRows]]
) -> None:
    """Compare the shapes of the base that the adapter names, if that folder is still there."""
    base = Path(str(config.get("base_model_name_or_path")))
    if not config.get("base_model_name_or_path") or not base.is_dir():
        return
    try:
        weights = WeightsFolder(base)
    except UserError:
        return  # No safetensors in it: nothing to compare.
    for parts in modules.values():
        rows = next(iter(parts.values()))
        shape = weights.shape(rows.hf_name)
        tied = shape is None and rows.hf_name == "lm_head.weight"
        if shape != rows.hf_shape and not tied:
            raise UserError(
                f"{folder}: an adapter of another base: {rows.hf_name} is {_size(shape)} in "
                f"{base}, {_size(rows.hf_shape)} in the model"
            )


def _check_shapes(
    folder: Path, config: dict[str, Any], name: str, shapes: Shapes, rows: ModuleRows
) -> None:
    if not {"a", "b"} <= set(shapes):
        raise UserError(f"{folder / WEIGHTS}: {name} lacks one of lora_A and lora_B")
    rank = shapes["a"][0]
    out_size, in_size = rows.hf_shape
    expected: Shapes = {"a": (rank, in_size), "b": (out_size, rank), "magnitude": (out_size,)}
    for leaf, shape in shapes.items():
        if shape != expected[leaf]:
            raise UserError(
                f"{folder}: an adapter of another base: {leaf} of {name} is {_size(shape)}, the "
                f"model needs {_size(expected[leaf])}"
            )
    check_rank(folder, config, name, rank)


def _check_covered(folder: Path, name: str, parts: dict[str, ModuleRows], b: Tensor) -> None:
    """The rows of a fused layer that no LoRA module of the model holds must be zero."""
    uncovered = torch.ones(b.shape[0], dtype=torch.bool)
    for rows in parts.values():
        uncovered[rows.places if rows.places is not None else slice(None)] = False
    if bool(b[uncovered].any()):
        raise UserError(
            f"{folder}: it adapts all of {name}, the model has LoRA on {', '.join(parts)} only"
        )


def _rows_of(rows: ModuleRows, tensors: Tensors, scale: float) -> LoadedLayer:
    magnitude = tensors.get("magnitude")
    return LoadedLayer(
        a=tensors["a"],
        b=rows.take(tensors["b"]),
        scale=scale,
        magnitude=None if magnitude is None else rows.take(magnitude),
    )


def _used_blocks(layer: LoadedLayer, config: dict[str, Any]) -> LoadedLayer:
    """Those blocks of a fused adapter's ranks that act on this part."""
    size = _block(layer.a.shape[0], config)
    blocks = zip(torch.split(layer.a, size), torch.split(layer.b, size, dim=1), strict=True)
    used = [(a, b) for a, b in blocks if bool(b.any())]
    if not used:
        return replace(layer, a=layer.a[:0], b=layer.b[:, :0])
    return replace(
        layer, a=torch.cat([a for a, _ in used]), b=torch.cat([b for _, b in used], dim=1)
    )


def _block(rank: int, config: dict[str, Any]) -> int:
    """Ranks of a fused adapter that belong to one part as `save_adapter` writes it."""
    base = int(config["r"])
    return base if rank % base == 0 else rank


def module_scale(module: Any) -> float:
    """What a LoRA or DoRA module multiplies B A by."""
    if isinstance(module, DoRALinear):
        return float(module.scaling)
    return float(module.alpha / module.rank)


def _lora_modules(model: nn.Module) -> dict[str, Any]:
    return {
        plain_module(f"{name}.lora_a.weight"): module
        for name, module in model.named_modules()
        if hasattr(module, "adapter_params")
    }


def _by_hf_name(model: nn.Module, source: ModelSource) -> dict[str, dict[str, ModuleRows]]:
    """The model's LoRA modules by the Hugging Face module that each is, or is a part of."""
    found: dict[str, dict[str, ModuleRows]] = defaultdict(dict)
    for name, rows in adapter_modules(model, source.model_type, source.checkpoint_dir).items():
        found[rows.hf_name.removesuffix(".weight")][name] = rows
    return dict(found)


def _is_fused(parts: dict[str, ModuleRows]) -> bool:
    rows = next(iter(parts.values()))
    return rows.places is not None and len(rows.places) != rows.hf_shape[0]


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
