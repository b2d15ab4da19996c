"""Toy runs with one feature of torchtune's more."""

from pathlib import Path
from typing import Any

import toy_run

from emarecipes.training import run_lora

KL = {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}}


UNTIED = {"_component_": "torchtune.models.llama3.lora_llama3", "scale_factor": None}


def write(models: dict[bool, Path], folder: Path, **changes: Any) -> Path:
    """A config in `folder`; keys of `model` and `dataset` are merged into theirs, None removes."""
    folder.mkdir(exist_ok=True)
    rows = toy_run.write_rows(folder / "rows.jsonl")
    untied = changes.get("model", {}).get("_component_") == UNTIED["_component_"]
    config = toy_run.toy_config(models[not untied], rows, folder / "out")
    config |= {"defenses": KL, "max_steps_per_epoch": 3}
    for key, value in changes.items():
        merged = config[key] | value if key in ("model", "dataset", "tokenizer") else value
        config[key] = (
            {k: v for k, v in merged.items() if v is not None}
            if isinstance(merged, dict)
            else merged
        )
    if untied:
        config["checkpointer"]["model_type"] = "LLAMA3"
    return toy_run.write_config(folder / "config.yaml", config)


def losses(folder: Path) -> list[tuple[float, float, float]]:
    return [(m["loss"], m["ce"], m["kl"]) for m in toy_run.metrics(folder / "out")]


def train(config: Path) -> list[tuple[float, float, float]]:
    assert run_lora(["--config", str(config)]) == 0
    return losses(config.parent)
