"""A toy run that is stopped and goes on."""

from pathlib import Path
from typing import Any

import toy_defenses
import toy_run
from safetensors.torch import load_file

from emarecipes.training import run_lora

EPOCHS, STEPS = 2, 4


class Run:
    """A toy run with interleaving, dropout and a KL term, in the process of the test."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.rows = toy_run.write_rows(folder / "rows.jsonl", 15)
        config = toy_run.toy_config(model, self.rows, folder / "out")
        config["tokenizer"]["max_seq_len"] = 64
        safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
        self.config: dict[str, Any] = toy_run.with_variable(config) | {
            "dataset": toy_defenses.interleaved(config["dataset"], safe),
            "shuffle": True,
            "epochs": EPOCHS,
            "max_steps_per_epoch": STEPS,
            "metric_logger": None,
            "save_every_n_steps": 2,
            "keep_last": 3,
            # Where a gradient is nearly zero, Adam makes up to a learning rate of its rounding.
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3},
            "defenses": {
                "kl": {
                    "_component_": "emarecipes.defenses.KLToReference",
                    "weight": 0.5,
                    "target": 1e-3,  # So that the weight of a step is of all steps before it.
                },
                "signal": {"_component_": "toy_mishaps.SignalAfter"},
            },
        }

    def arguments(self, output: str, *overrides: str) -> list[str]:
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return ["--config", str(path), f"output_dir={self.folder / output}", *overrides]

    def __call__(self, output: str, *overrides: str) -> int:
        return run_lora(self.arguments(output, *overrides))

    def steps(self, output: str) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.folder / output / "checkpoints").iterdir())

    def result(self, output: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
        rows = toy_run.metrics(self.folder / output)
        for row in rows:
            row.pop("tokens_per_second")
        adapter = self.folder / output / "adapter/adapter_model.safetensors"
        return rows, load_file(adapter)


def same(one: Any, other: Any) -> bool:
    equal = all(other[1][name].equal(tensor) for name, tensor in one[1].items())
    return one[0] == other[0] and equal
