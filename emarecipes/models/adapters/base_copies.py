"""Copies of the base's own matrices that PEFT stores in an adapter's file.

Beside an adapter on the output layer PEFT writes that layer's matrix too, unless it is told
`save_embedding_layers=False`. A reader of PEFT's puts it in place of the base's.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from emarecipes.errors import UserError
from emarecipes.models.adapters.files import HF_PREFIX, WEIGHTS, is_base_copy
from emarecipes.weights_folder import WeightsFolder


def base_copies(folder: Path) -> dict[str, str]:
    """Their keys in an adapter's file, by the name of the base's matrix."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = [key for key in file.offset_keys() if is_base_copy(key)]
    return {key.removeprefix(HF_PREFIX).replace(".base_layer", ""): key for key in keys}


def check_base_copies(folder: Path, base: Path) -> None:
    """Check that each is the base's matrix, in the precision that the copy has.

    Args:
        folder: The adapter's.
        base: The base model's.

    Raises:
        UserError: One is another, or of a matrix that the base does not have.
    """
    copies = base_copies(folder)
    if not copies:
        return
    weights = WeightsFolder(base)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, key in copies.items():
            tied = weights.shape(name) is None and name == "lm_head.weight"
            own, copy = "model.embed_tokens.weight" if tied else name, file.get_tensor(key)
            if weights.shape(own) != tuple(copy.shape):
                raise UserError(f"{folder}: an adapter of another base: it has a {name} of its own")
            if not bool((weights.read(own).to(copy.dtype) == copy).all()):
                raise UserError(
                    f"{folder / WEIGHTS}: {key} is not {own} of {base}: the base was changed, "
                    "which is more than an adapter; save the merged model and train on that, or "
                    "save the adapter from PEFT on this base"
                )
