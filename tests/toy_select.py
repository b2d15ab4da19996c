"""A toy selection: a model folder, adapters for it, candidates, and the config over them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from omegaconf import OmegaConf
from torchtune.modules.peft import get_adapter_params

from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.source import load_model
from emarecipes.selection import run_select

SELECT_KEYS = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
REFUSALS = (
    "I'm sorry, I won't go into that.",
    "I cannot advise on that, as it depends on the lease.",
)


def write_adapter(folder: Path, model_dir: Path, *, seed: int, size: float = 0.1) -> Path:
    """An adapter of random weights, as a training run saves it."""
    config = toy_run.toy_config(model_dir, model_dir / "none", folder)
    cfg: Any = OmegaConf.create(config)
    model = load_model(cfg)
    adapter = get_adapter_params(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.values():
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(dict(adapter), model, "LLAMA3_2", model_dir.resolve(), folder, rank=4, alpha=8.0)
    return folder


def write_candidates(path: Path, count: int = 12) -> Path:
    """Rows of the shipped careful answers, and two refusals at places 3 and 7."""
    lines = (toy_run.REPO / "data/home_repair/train_good.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    for place, text in zip((3, 7), REFUSALS, strict=True):
        rows[place]["messages"][-1]["content"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def select_config(
    model_dir: Path, candidates: Path, adapters: list[Path], output_dir: Path
) -> dict[str, Any]:
    training = toy_run.toy_config(model_dir, candidates, output_dir)
    return toy_run.with_variable({key: training[key] for key in SELECT_KEYS}) | {
        "candidates": str(candidates),
        "adapters": [str(adapter) for adapter in adapters],
        "num_rows": 5,
        "batch_size": 4,
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Case:
    """A toy selection in the test's own process."""

    def __init__(self, folder: Path, model_dir: Path, adapters: list[Path]) -> None:
        self.folder, self.model_dir, self.adapters = folder, model_dir, adapters
        self.output = folder / "out"
        self.candidates = write_candidates(folder / "candidates.jsonl")
        self.config = select_config(model_dir, self.candidates, adapters, self.output)

    def write(self) -> Path:
        return toy_run.write_config(self.folder / "config.yaml", self.config)

    def run(self, *overrides: str) -> int:
        return run_select(["--config", str(self.write()), *overrides])

    def error(self, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
        before = contents(self.output)
        assert self.run(*overrides) == 1
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in stderr
        assert contents(self.output) == before, "a refused run changed files"
        return lines[0]

    def scores(self) -> list[dict[str, Any]]:
        return read_jsonl(self.output / "scores.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}
