"""A toy model and its saved adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from toy_models import toy_model

from emarecipes.defenses import ModelSource
from emarecipes.models._torchtune_convert import fix_dora_bias
from emarecipes.models.adapters.export import save_adapter

MODEL_TYPES = {
    "llama3": "LLAMA3",
    "llama3_2": "LLAMA3_2",
    "qwen2_5": "QWEN2",
    "qwen2_tied": "QWEN2",
    "mistral": "MISTRAL",
    "gemma2": "GEMMA2",
    "phi3": "PHI3_MINI",
}


@dataclass
class Saved:
    """A model with an adapter, and that adapter in a folder."""

    model: TransformerDecoder
    folder: Path
    source: ModelSource
    family: str
    dora: bool

    def fresh(self, **overrides: Any) -> TransformerDecoder:
        """The same base with another adapter."""
        model = toy_model(self.family, dora=self.dora, seed=1, **overrides)
        base = {k: v for k, v in self.model.state_dict().items() if k in model.state_dict()}
        model.load_state_dict(
            {k: v for k, v in base.items() if "lora" not in k and "magnitude" not in k},
            strict=False,
        )
        fix_dora_bias(model)
        return model.eval()

    def edit_config(self, **changes: Any) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    def write_tensors(self, tensors: dict[str, Tensor]) -> None:
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            self.folder / "adapter_model.safetensors",
        )


def saved(
    folder: Path, family: str, *, dora: bool = False, alpha: float = 8.0, **overrides: Any
) -> Saved:
    model = toy_model(family, dora=dora, lora_alpha=alpha, **overrides).eval()
    fix_dora_bias(model)
    (base := folder / "base").mkdir()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    if family == "gemma2":
        config["head_dim"] = 16
    (base / "config.json").write_text(json.dumps(config))
    source = ModelSource(model, base, MODEL_TYPES[family])
    save_adapter(
        get_adapter_params(model), model, source.model_type, base, folder / "adapter",
        rank=4, alpha=alpha,
    )  # fmt: skip
    return Saved(model, folder / "adapter", source, family, dora)
