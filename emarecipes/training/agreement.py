"""Whether the model that the config builds is the one that the checkpoint's config.json describes.

Shapes do not tell: with another rotary base, epsilon or order of q and k it loads and is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emarecipes._torchtune import final_norm_and_cap
from emarecipes._torchtune_convert import read_config
from emarecipes.errors import UserError

# Families by config.json's model_type.
_FAMILIES = {
    "llama": ("LLAMA2", "LLAMA3", "LLAMA3_2"),
    "mistral": ("MISTRAL",),
    "qwen2": ("QWEN2",),
    "gemma": ("GEMMA",),
    "gemma2": ("GEMMA2",),
    "phi3": ("PHI3_MINI", "PHI4"),
}


def check_agreement(base_dir: Path, model: Any, model_type: str) -> None:
    """Compare the built model with the base folder's config.json.

    Args:
        base_dir: The Hugging Face folder that weights are loaded from.
        model: torchtune's decoder, on any device.
        model_type: The checkpointer's.

    Raises:
        UserError: They differ in family, heads, epsilon, rotary base or rotary scaling.
    """
    config = read_config(base_dir, model)
    where = base_dir / "config.json"
    families = _FAMILIES.get(str(config.get("model_type")))
    if families is not None and model_type not in families:
        raise UserError(
            f"{where} is of a {config['model_type']} model: checkpointer.model_type must be "
            f"{' or '.join(families)}, not {model_type}"
        )
    norm, _ = final_norm_and_cap(model)
    rope = model.layers[0].attn.pos_embeddings
    stated_rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or stated_rope
    default_factor = 1.0 if scaling.get("rope_type", "default") == "default" else None
    compared = {
        "norm_eps": (getattr(norm, "eps", None), config.get("rms_norm_eps")),
        "rope_base": (
            getattr(rope, "base", None),
            config.get("rope_theta", stated_rope.get("rope_theta")),
        ),
        "scale_factor": (
            getattr(rope, "scale_factor", None),
            scaling.get("factor", default_factor),
        ),
    }
    for name, (built, stated) in compared.items():
        if built is not None and stated is not None and abs(built - stated) > 1e-6 * abs(stated):
            raise UserError(f"the model is built with {name} {built:g}, {where} says {stated:g}")
