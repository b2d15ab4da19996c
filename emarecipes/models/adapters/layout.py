"""Where an adapter's layers lie in Hugging Face's layout, and their form there.

Nothing here repeats what torchtune's converters do for a family: an adapter's rows go where they
put the base's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emarecipes.errors import UserError
from emarecipes.models._torchtune_convert import read_base_config, to_hf

_ADAPTER_LEAVES = ("lora_a.weight", "lora_b.weight", "magnitude")

# Prefixes that activation checkpointing and torch.compile put into parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def _linear_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of output rows of every linear layer of `model`, by module name."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        module, _, leaf = name.rpartition(".")
        linear = leaf == "weight" and parameter.dim() == 2
        in_decoder = module == "output" or module.startswith("layers.")
        if linear and in_decoder and not module.endswith(("lora_a", "lora_b")):
            sizes[module] = parameter.shape[0]
    return sizes


# One torchtune module inside a Hugging Face weight: its name, the rows it fills there, and which
# of its own rows they are.
_Part = tuple[str, Tensor, Tensor]


def _hf_rows(
    out_sizes: dict[str, int], model_type: str, config: dict[str, Any]
) -> dict[str, list[_Part]]:
    """Find where each row of torchtune's linear layers goes in Hugging Face's layout.

    The converter itself tells: it is fed one-column weights whose entries number all rows. The
    result has each Hugging Face module's parts in order: several where weights are fused.
    """
    names, sizes = list(out_sizes), list(out_sizes.values())
    starts = torch.tensor([0, *sizes]).cumsum(0)
    numbers = torch.arange(int(starts[-1])).unsqueeze(1).split(sizes)
    weights = {f"{name}.weight": rows for name, rows in zip(names, numbers, strict=True)}
    parts: dict[str, list[_Part]] = {}
    for hf_name, column in to_hf(weights, model_type, config, columns=1).items():
        row_numbers = column.flatten()
        owners = torch.bucketize(row_numbers, starts, right=True) - 1
        parts[hf_name.removesuffix(".weight")] = [
            (names[owner], places, row_numbers[places] - starts[owner])
            for owner in owners.unique().tolist()
            for places in [(owners == owner).nonzero().flatten()]
        ]
    return parts


class ModuleRows(NamedTuple):
    """Where the weight of one torchtune linear layer lies in Hugging Face's.

    Attributes:
        hf_name: The weight there; several layers share it where weights are fused.
        hf_shape: Its shape.
        places: For each row of the layer, which row of that weight it is; None: all, in order.
    """

    hf_name: str
    hf_shape: tuple[int, int]
    places: Tensor | None

    def take(self, weight: Tensor) -> Tensor:
        """The layer's own rows, in torchtune's order."""
        return weight if self.places is None else weight[self.places]


def adapter_modules(model: nn.Module, model_type: str, base_dir: Path) -> dict[str, ModuleRows]:
    """Find the weight of every adapted layer of a model, by torchtune's name.

    Args:
        model: torchtune's model with LoRA, on any device; only its structure is read.
        model_type: name of torchtune's ``ModelType``.
        base_dir: folder of the base model, for its config.json.
    """
    columns = {
        plain_module(name): parameter.shape[1]
        for name, parameter in model.named_parameters()
        if name.endswith("lora_a.weight")
    }
    found = {}
    config = read_base_config(base_dir, model)
    for hf_name, parts in _hf_rows(_linear_sizes(model), model_type, config).items():
        rows = sum(len(places) for _, places, _ in parts)
        for name, places, own_rows in parts:
            if name in columns:
                order = places[own_rows.argsort()]
                found[name] = ModuleRows(f"{hf_name}.weight", (rows, columns[name]), order)
    return {name: found[name] for name in columns}


def linear_modules(model: nn.Module, model_type: str, base_dir: Path) -> list[str]:
    """Hugging Face's names of all linear layers of a model, adapted or not."""
    return list(_hf_rows(_linear_sizes(model), model_type, read_base_config(base_dir, model)))


def plain_module(parameter: str) -> str:
    """The layer that a LoRA parameter belongs to, without what wrappers put into its name."""
    for wrapper in _WRAPPERS:
        parameter = parameter.replace(wrapper, "")
    return parameter.removesuffix(".weight").rpartition(".")[0]


# One adapted layer: {"lora_a.weight": (rank, in), "lora_b.weight": (out, rank)} and, for DoRA,
# {"magnitude": (out,)}.
AdapterLayer = dict[str, Tensor]


def adapter_layers(adapter_state: dict[str, Tensor], rank: int) -> dict[str, AdapterLayer]:
    """Group an adapter's tensors by layer, and check that they are complete."""
    layers: dict[str, AdapterLayer] = defaultdict(dict)
    for key, tensor in adapter_state.items():
        leaf = next((leaf for leaf in _ADAPTER_LEAVES if key.endswith(f".{leaf}")), None)
        if leaf is None:
            raise UserError(f"adapter: {key} belongs to neither LoRA nor DoRA")
        layers[key.removesuffix(f".{leaf}")][leaf] = tensor.detach().cpu()
    if not layers:
        raise UserError("adapter: it has no weights")
    leaves = set(next(iter(layers.values())))
    for name, layer in layers.items():
        if set(layer) != leaves or not leaves.issuperset(_ADAPTER_LEAVES[:2]):
            raise UserError(f"adapter: {name} has {sorted(layer)}, other layers {sorted(leaves)}")
        if layer["lora_a.weight"].shape[0] != rank or layer["lora_b.weight"].shape[1] != rank:
            raise UserError(f"adapter: {name} is not of rank {rank}")
    return dict(layers)


def adapter_to_hf(
    layers: dict[str, AdapterLayer],
    model: nn.Module,
    model_type: str,
    config: dict[str, Any],
    ratio: float,
    *,
    one_alpha: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Bring an adapter's layers into Hugging Face's row order, under PEFT's names.

    Where weights are fused, the adapters of the parts become one of their added ranks.

    Args:
        layers: torchtune's layers, from `adapter_layers`.
        model: torchtune's model, on any device; only its structure is read.
        model_type: name of torchtune's ``ModelType``.
        config: the base model's ``config.json``.
        ratio: factor for B, from `exported_scale`.
        one_alpha: let B of a fused layer absorb its higher rank too, so that its scale needs no
            alpha of its own.

    Raises:
        UserError: for a layer that the model lacks, and for DoRA on fused weights.
    """
    sizes = _linear_sizes(model)
    if unknown := sorted(set(layers) - set(sizes)):
        raise UserError(f"adapter: {unknown[0]} is not a linear layer of the model")
    adapted = {}
    for hf_name, parts in _hf_rows(sizes, model_type, config).items():
        present = [layers[name] for name, _, _ in parts if name in layers]
        if len(parts) > 1 and any("magnitude" in layer for layer in present):
            raise UserError(f"{hf_name} is fused: PEFT has no form for DoRA on its parts; use LoRA")
        if present:
            rank_factor = len(present) if one_alpha else 1
            adapted[hf_name] = _fuse_parts(parts, layers, ratio * rank_factor)
    return adapted


def _fuse_parts(
    parts: list[_Part], layers: dict[str, AdapterLayer], ratio: float
) -> dict[str, Tensor]:
    """Stack A and make B block-diagonal; parts without an adapter get zero rows, and no rank."""
    adapted = [(layers[name], places, rows) for name, places, rows in parts if name in layers]
    a = torch.cat([layer["lora_a.weight"] for layer, _, _ in adapted])
    out_size = sum(len(places) for _, places, _ in parts)
    # fp32 where B absorbs a factor: rounding to bf16 could lose it.
    dtype = a.dtype if ratio == 1.0 else torch.float32
    b = torch.zeros(out_size, a.shape[0], dtype=dtype)
    fused = {"lora_A.weight": a, "lora_B.weight": b}
    for (layer, places, rows), columns in zip(
        adapted, b.split(a.shape[0] // len(adapted), dim=1), strict=True
    ):
        columns[places] = layer["lora_b.weight"][rows].to(dtype) * ratio
        if "magnitude" in layer:
            fused["lora_magnitude_vector"] = torch.empty_like(layer["magnitude"])
            fused["lora_magnitude_vector"][places] = layer["magnitude"][rows]
    return fused


def exported_scale(alpha: float, rank: int, *, plain: bool = False) -> tuple[int, bool, float]:
    """Express torchtune's scale, alpha / rank, by an integer ``lora_alpha``.

    vLLM reads ``lora_alpha`` as an integer, and torchtune has no rank-stabilised option: there
    alpha 64 at rank 32 is written 64 * sqrt(32) = 362.04.

    Args:
        alpha: torchtune's ``lora_alpha``.
        rank: LoRA rank in training.
        plain: never say ``use_rslora``.

    Returns:
        ``lora_alpha``, ``use_rslora``, and torchtune's scale over the exported one (by PEFT:
        lora_alpha / rank, or lora_alpha / sqrt(rank)), which B must absorb.

    Raises:
        UserError: if alpha is not positive.
    """
    if alpha <= 0:
        raise UserError(f"lora_alpha: {alpha} is not positive")
    if float(alpha).is_integer():
        return int(alpha), False, 1.0
    stabilised = alpha / math.sqrt(rank)
    nearest = round(stabilised)
    if not plain and nearest >= 1 and math.isclose(stabilised, nearest, rel_tol=1e-4, abs_tol=1e-3):
        return nearest, True, stabilised / nearest
    rounded = max(1, round(alpha))
    return rounded, False, alpha / rounded


def target_modules(adapted: Iterable[str]) -> list[str] | str:
    """The last parts of the names, which PEFT looks for everywhere; a pattern for text alone.

    The vision tower of a model of text and images has modules of the same last names.
    """
    prefix = "model.language_model."
    last = sorted({name.rpartition(".")[2] for name in adapted})
    if not all(name.startswith(prefix) for name in adapted):
        return last
    return rf"{re.escape(prefix)}.*\.({'|'.join(last)})"
