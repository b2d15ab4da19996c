"""Toy runs with terms that read the reference, to be run with a reference cache and without."""

import json
from pathlib import Path
from typing import Any

import torch
import toy_defenses
import toy_run
from safetensors.torch import load_file

from emarecipes.training import run_lora

COMPONENT = "emarecipes.defenses."
KL = {"_component_": COMPONENT + "KLToReference", "weight": 0.5}
FEATURES = {
    "_component_": COMPONENT + "FeatureL2",
    "weight": 0.02,
    "every_n_layers": 1,
    "gradient_ratio_every": 3,
}


def cached_config(folder: Path, model_dir: Path) -> dict[str, Any]:
    """KL, FeatureL2 and persona steering on interleaved rows, their files in `folder`."""
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl", 12), folder)
    # Two steps of two micro-batches an epoch, the same batches in both epochs.
    config |= {"epochs": 2, "max_steps_per_epoch": 2, "metric_logger": None}
    config |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    config["tokenizer"]["max_seq_len"] = 96
    safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
    config["dataset"] = toy_defenses.interleaved(config["dataset"], safe, placement="per_batch")
    entries = toy_defenses.defense_entries(folder, model, toy_run.LAYERS, toy_run.WIDTH)
    config["defenses"] = {"kl": KL, "feature_l2": FEATURES, "persona": entries["persona"]}
    return config


def write(toy: dict[str, Any], folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(toy)) | {"output_dir": str(folder / "out")} | changes
    config["checkpointer"]["output_dir"] = str(folder / "out")
    return str(toy_run.write_config(folder / "config.yaml", config))


def trained(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    rows = toy_run.metrics(folder / "out")
    for row in rows:
        row.pop("tokens_per_second")
    return rows, load_file(folder / "out/adapter/adapter_model.safetensors")


def train(toy: dict[str, Any], folder: Path, **changes: Any) -> Any:
    assert run_lora(["--config", write(toy, folder, **changes)]) == 0
    return trained(folder)


def assert_identical(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(tensor, other[1][key]) for key, tensor in one[1].items())
