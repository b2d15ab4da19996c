"""A toy run with defenses: what it needs on disk, its config, its training and its results."""

from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import torch
import toy_defenses
import toy_run
from safetensors.torch import load_file
from torch.testing import assert_close

from emarecipes.training import run_lora


def defended_toy(
    folder: Path, tokenizer_dir: Path, vocabulary: int = toy_run.VOCABULARY
) -> dict[str, Any]:
    """The parts of a toy run with all defenses: `config`, `mixed` data, `defenses`, `model`."""
    model = toy_run.write_toy_model(folder / "model", tokenizer_dir, vocabulary=vocabulary)
    rows = toy_run.write_rows(folder / "rows.jsonl", 12)
    config = toy_run.toy_config(model, rows, folder / "out")
    config["model"]["vocab_size"] = vocabulary
    config |= {"shuffle": True, "max_steps_per_epoch": 2, "pad_to_multiple_of": 32}
    config["tokenizer"]["max_seq_len"] = 96
    # Where a gradient is nearly zero, Adam makes up to a learning rate of its rounding.
    config["optimizer"]["lr"] = 2e-3
    safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
    mixed = toy_defenses.interleaved(config["dataset"], safe, placement="per_batch")
    defenses = toy_defenses.defense_entries(folder, model, toy_run.LAYERS, toy_run.WIDTH)
    return {"config": config, "mixed": mixed, "defenses": defenses, "model": model}


def template_toy(folder: Path) -> dict[str, Any]:
    """`defended_toy` with a tokenizer that has a chat template; an adapter from step 2 on."""
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    toy = defended_toy(folder, tokenizer, fuzz_cases.VOCABULARY)
    toy["config"]["tokenizer"]["max_seq_len"] = 256
    toy["config"]["lr_scheduler"]["num_warmup_steps"] = 0
    return toy


def write_defended(toy: dict[str, Any], folder: Path, names: Any, **changes: Any) -> Path:
    """The config of a run in `folder` with the named defenses."""
    folder.mkdir(exist_ok=True)
    config = toy["config"] | {"dataset": toy["mixed"]}
    config |= {"defenses": {name: toy["defenses"][name] for name in names}} | changes
    config["output_dir"] = str(folder / "out")
    config["checkpointer"] = config["checkpointer"] | {"output_dir": str(folder / "out")}
    config["metric_logger"] = None
    return toy_run.write_config(folder / "config.yaml", config)


def trained(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """A finished run's metrics and its adapter."""
    rows = toy_run.metrics(folder / "out")
    for row in rows:
        row.pop("tokens_per_second")
    return rows, load_file(folder / "out/adapter/adapter_model.safetensors")


def without_parts(rows: list[dict[str, float]], *figures: str) -> None:
    """Leave out what is of one micro-batch or process: what depends on how a step is split."""
    for row in rows:
        for key in [k for k in row if k in figures]:
            del row[key]


def train(config: Path, *overrides: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Run a config in this process; see `trained`."""
    assert run_lora(["--config", str(config), *overrides]) == 0
    return trained(config.parent)


def assert_same(one: Any, other: Any, rel: float = 1e-4) -> None:
    """Two runs have the same metrics and adapters."""
    for expected, found in zip(one[0], other[0], strict=True):
        assert found == pytest.approx(expected, rel=rel, abs=2e-6)
    assert one[1].keys() == other[1].keys()
    for key, tensor in one[1].items():
        assert_close(other[1][key], tensor, rtol=rel, atol=1e-4)
