"""Where a model's weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
