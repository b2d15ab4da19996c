"""Where a model's weights come from, and how they are loaded for inference, on one device."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training
from torchtune.config import instantiate
from torchtune.utils import get_device

from emarecipes.machine import DTYPES
from emarecipes.models._torchtune_convert import fix_dora_bias, fix_loaded_state
from emarecipes.models._undrawn import Undrawn


@dataclass(frozen=True)
class ModelSource:
    """Where the trained model comes from, known before any weight is loaded.

    Attributes:
        meta_model: torchtune's decoder with LoRA, on the meta device.
        checkpoint_dir: The folder of its base weights, in Hugging Face's format.
        model_type: Name of torchtune's `ModelType`.
    """

    meta_model: Any
    checkpoint_dir: Path
    model_type: str


def load_model(cfg: DictConfig) -> Any:
    """The model that `cfg.model` and `cfg.checkpointer` describe, in eval mode and frozen.

    Its adapter is zero at first; see `emarecipes.models.adapters.read` to load one. Check the
    config with `emarecipes.models.model_checks.check_model` before.

    Args:
        cfg: With `model`, `checkpointer`, `dtype`, `device`.

    Returns:
        torchtune's decoder on the device.
    """
    device = get_device(cfg.device or "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        checkpointer = instantiate(cfg.checkpointer, output_dir=scratch)
        state = checkpointer.load_checkpoint()[training.MODEL_KEY]
    dtype = DTYPES[cfg.dtype]
    with training.set_default_dtype(dtype), device, Undrawn():
        model: Any = instantiate(cfg.model)
    model.load_state_dict(fix_loaded_state(state, str(cfg.checkpointer.model_type)), strict=False)
    fix_dora_bias(model)
    model.requires_grad_(False)
    return model.eval()
