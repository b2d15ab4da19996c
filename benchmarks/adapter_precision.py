"""What holding an adapter in bf16 loses of training, and what holding it in fp32 costs a step.

Learned: SmolLM2-135M-Instruct on careless repair advice, the recipe as it is, with an adapter held
in fp32 and one in bf16 (base and products in fp32 in both, so that nothing else differs), at the
same seed, rows and steps. In-domain shift: by how many nats a token the careless one of two answers
to held-out questions became likelier against the careful one (docs/evaluate.md).

Cost: processor time of a step with the base in bf16, the two adapters in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from plan_check import make_rows
from rich.console import Console
from rich.table import Table
from step_cost import Trainer, describe_machine, ours
from torchtune import training

from emarecipes.config import load_config
from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.models._torchtune_recipe import stock_recipe
from emarecipes.training.run import run_lora
from emarecipes.training.settings import check_settings
from emarecipes.training.step import TrainingLoss

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2_135m_lora.yaml"
HELD = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = "emarecipes.training.built"


def learned(held: str, rate: float, steps: int, questions: int) -> dict[str, float]:
    """Figures of a run's last step."""
    suite = {side: str(ROOT / f"data/home_repair/heldout_{side}.jsonl") for side in ("good", "bad")}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch(f"{RECIPE}.hold_adapter_in", lambda model, _: hold_adapter_in(model, HELD[held])),
        patch(f"{RECIPE}.with_fewer_passes", lambda model: None),
    ):
        probe = {"suites": {"in_domain": suite}, "every_n_steps": steps, "max_rows": questions}
        options = [
            f"output_dir={folder}/run", "dtype=fp32", "batch_size=2", f"optimizer.lr={rate}",
            f"dataset.data_files={ROOT / 'data/home_repair/train_bad.jsonl'}",
            f"max_steps_per_epoch={steps}",
            f"probe={json.dumps(probe)}",
        ]  # fmt: skip
        if run_lora(["--config", str(CONFIG), *options]) != 0:
            raise SystemExit("the run failed")
        text = Path(folder, "run", "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {key: value for line in lines for key, value in line.items() if "in_domain" in key}


def step_seconds(rounds: int) -> dict[str, list[float]]:
    """Processor seconds of steps of 1 x 64 tokens by what the adapter is held in."""
    found: dict[str, list[float]] = {held: [] for held in HELD}
    trainers = {}
    for held, dtype in HELD.items():
        raw, origin = load_config(["--config", str(CONFIG), "output_dir=unused", "dtype=bf16"])
        cfg = check_settings(raw, origin)
        recipe = stock_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice(cfg)
        weights = recipe.load_checkpoint(cfg.checkpointer)[training.MODEL_KEY]
        model = recipe._setup_model(cfg.model, False, False, False, weights)
        hold_adapter_in(model, dtype)
        trainers[held] = Trainer(model, partial(ours, TrainingLoss(model, {})))
    batch = make_rows(1, 64)
    for i in range(rounds + 1):
        for held in list(HELD)[:: 1 if i % 2 else -1]:
            started = time.process_time()
            trainers[held].step(batch)
            found[held] += [time.process_time() - started] if i else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="An adapter in fp32 and in bf16.")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-4, 2e-5])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4, help="of steps in bf16; 0: none are timed")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    print(describe_machine())
    figures: dict[str, Any] = {}
    table = Table("lr", *HELD, "bf16 / fp32", title=f"In-domain shift after {options.steps} steps")
    for rate in options.rates:
        runs = {held: learned(held, rate, options.steps, options.questions) for held in HELD}
        shifts = {held: run["probe_in_domain_shift"] for held, run in runs.items()}
        share = shifts["bf16"] / shifts["fp32"]
        table.add_row(f"{rate:g}", *(f"{s:+.4f}" for s in shifts.values()), f"{share:.2f}")
        figures[f"lr {rate:g}"] = runs
    Console().print(table)
    if options.rounds:
        seconds = step_seconds(options.rounds)
        medians = {held: statistics.median(times) for held, times in seconds.items()}
        print(
            f"processor seconds of a step in bf16, medians of {options.rounds}: "
            f"{medians['fp32']:.2f} with the adapter in fp32, {medians['bf16']:.2f} in bf16: "
            f"{medians['fp32'] / medians['bf16']:.3f}"
        )
        figures["step seconds"] = seconds
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
