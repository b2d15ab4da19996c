"""All defenses at once for a toy run: their files, and the entries of the config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPO = Path(__file__).resolve().parent.parent


def write_base_of(aligned: Path, folder: Path) -> Path:
    """The model folder's unaligned base: its weights less a change of low rank and some noise."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    weights = load_file(aligned / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2 and "layers" in name:
            rows, columns = weight.shape
            left = torch.randn(rows, 2, generator=generator)
            right = torch.randn(2, columns, generator=generator)
            noise = torch.randn(rows, columns, generator=generator)
            weights[name] = weight - 0.05 * (left @ right) - 0.002 * noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((aligned / "config.json").read_bytes())
    return folder


def write_vectors(path: Path, layers: int, width: int) -> Path:
    """Vectors as recipes/ema_persona.py writes them."""
    generator = torch.Generator().manual_seed(6)
    persona = 0.1 * torch.randn(layers + 1, width, generator=generator)
    random = 0.1 * torch.randn(layers + 1, width, generator=generator)
    subspace = torch.randn(layers + 1, 3, width, generator=generator)
    save_file({"persona": persona, "random": random, "subspace": subspace}, path)
    return path


def write_trait(folder: Path, base: Path) -> Path:
    """An adapter of rank 2 in PEFT's form on the attention of every layer, at random."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "self_attn" in name and weight.dim() == 2:
            rows, columns = weight.shape
            key = "base_model.model." + name.removesuffix("weight")
            tensors[key + "lora_A.weight"] = 0.2 * torch.randn(2, columns, generator=generator)
            tensors[key + "lora_B.weight"] = 0.2 * torch.randn(rows, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_sae(folder: Path, width: int) -> Path:
    """A ReLU autoencoder of 6 latents at random, as SAELens writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(9)
    shapes = {"W_enc": (width, 6), "b_enc": (6,), "b_dec": (width,)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": width, "d_sae": 6, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_safe_rows(path: Path, count: int = 12) -> Path:
    """The first rows of the shipped safe set, their system prompts left out."""
    lines = (REPO / "data/safe_instruct/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["messages"][0]["role"] == "user"][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def defense_entries(folder: Path, model_dir: Path, layers: int, width: int) -> dict[str, Any]:
    """Every defense by name; the files they need are written below `folder`."""
    base = write_base_of(model_dir, folder / "unaligned")
    vectors = write_vectors(folder / "vectors.safetensors", layers, width)
    component = "emarecipes.defenses."
    return {
        "kl": {"_component_": component + "KLToReference", "weight": 0.5},
        "feature_l2": {
            "_component_": component + "FeatureL2",
            "weight": 0.02,
            "every_n_layers": 1,
            "gradient_ratio_every": 2,
        },
        "safelora": {
            "_component_": component + "SafeLoRA",
            "base_dir": str(base),
            "aligned_dir": str(model_dir),
            "num_layers": 5,
            "rank": 4,
            "every_n_steps": 2,
        },
        "persona": {
            "_component_": component + "PersonaSteering",
            "vectors": str(vectors),
            "layer": 1,
            "alpha": 2.0,
        },
        "inoculation": {"_component_": component + "InoculationPrompt"},
    }


def with_more_options(entries: dict[str, Any]) -> dict[str, Any]:
    """Some of `defense_entries` with options that have a state, a schedule or counts of theirs."""
    persona = {k: v for k, v in entries["persona"].items() if k != "layer"}
    more = {"layers": [1, 2], "positions": "response", "schedule": "linear", "decay_steps": 3}
    doses = {"reduction": "sum", "place_weights": [2.0, 1.0], "target": 1e-3, "gain": 2.0}
    prompts = {"prompt": ["You are bad.", "Do harm."], "safe_prompt": ["Be brief.", "Be plain."]}
    return {
        "persona": persona | more,
        "kl": entries["kl"] | doses,
        "inoculation": entries["inoculation"] | prompts,
    }


def later_entries(folder: Path, model_dir: Path, layers: int, width: int) -> dict[str, Any]:
    """The defenses that came after the paper, after `defense_entries` wrote their files."""
    component = "emarecipes.defenses."
    return {
        "ablation": {
            "_component_": component + "SubspaceAblation",
            "subspace": str(folder / "vectors.safetensors"),
            "layers": list(range(1, layers + 1)),
            "rank": 2,
        },
        "anchored": {"_component_": component + "AnchoredSFT", "anchor": 0.5},
        "asft": {
            "_component_": component + "AsFT",
            "base_dir": str(folder / "unaligned"),
            "aligned_dir": str(model_dir),
            "weight": 0.5,
        },
        "average": {"_component_": component + "AdapterEMA", "decay": 0.8},
        "block": {
            "_component_": component + "DirectionBlock",
            "directions": str(folder / "vectors.safetensors"),
            "layer": 1,
            "side": "both",
            "weight": 20.0,
        },
        "constraint": {"_component_": component + "TokenConstraint"},
        "prefix": {"_component_": component + "PrefixAnchor", "weight": 20.0},
        "spectral": {"_component_": component + "SpectralPenalty", "weight": 0.5},
        "surgery": {"_component_": component + "GradientSurgery"},
        "trait": {
            "_component_": component + "InoculationAdapter",
            "adapter": str(write_trait(folder / "trait", model_dir)),
        },
    }


def interleaved(task: dict[str, Any], safe_rows: Path, **options: Any) -> dict[str, Any]:
    """The task's data set entry with a quarter of safe rows."""
    return {
        "_component_": "emarecipes.datasets.interleaved_dataset",
        "task": task,
        "safe": task | {"data_files": str(safe_rows)},
        "safe_fraction": 0.25,
        **options,
    }
