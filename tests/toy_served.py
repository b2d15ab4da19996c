"""A random adapter of the toy model, and the served check of it."""

import json
from pathlib import Path
from typing import Any

import torch
import toy_run
from safetensors.torch import save_file
from toy_generate import Case

from emarecipes.served import run_served

RANK = 4
NAME = "openai-api/toy/m"


def write_adapter(folder: Path, model_dir: Path, **config: Any) -> Path:
    """A random adapter on every matrix; its update does not depend on the config's scale."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    width, kv = toy_run.WIDTH, toy_run.WIDTH // toy_run.HEADS * toy_run.KV_HEADS
    attention = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
    mlp = {"gate": (toy_run.MLP, width), "up": (toy_run.MLP, width), "down": (width, toy_run.MLP)}
    shapes = {f"self_attn.{p}_proj": s for p, s in attention.items()}
    shapes |= {f"mlp.{p}_proj": s for p, s in mlp.items()}
    tensors = {}
    for layer in range(toy_run.LAYERS):
        for part, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{part}"
            a = torch.randn(RANK, columns, generator=generator)
            b = torch.randn(rows, RANK, generator=generator)
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": 0.05 * b}
    save_file(tensors, folder / "adapter_model.safetensors")
    plain: dict[str, Any] = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_rslora": False,
        "target_modules": [part.partition(".")[2] for part in shapes],
        "base_model_name_or_path": str(model_dir),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def served(case: Case, adapter: Path, *more: str, model: str = NAME) -> int:
    path = toy_run.write_config(case.folder / "config.yaml", case.config)
    options = ["--adapter", str(adapter), "--model", model, "--prompts", "3", "--tokens", "8"]
    return run_served([str(path), *options, *more])
