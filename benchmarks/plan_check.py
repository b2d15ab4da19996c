"""Predicted and measured peak memory of a training step, for five configs of SmolLM2-135M.

Predicted: `emarecipes.plan`'s estimate. Measured: each config in a fresh process, on a CPU: the
peak of resident memory in the second step, less what the process held before it built the model;
so weights, adapter, optimizer, activations and loss head are in it. Every row has the same length.
The target is 15 %.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_cost import Trainer, ours, peak_mb
from torchtune import training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft

from emarecipes.components import build
from emarecipes.config import load_config
from emarecipes.defenses import ModelSource
from emarecipes.machine import DTYPES, settle_dtype
from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.models._torchtune_recipe import stock_recipe
from emarecipes.models.batch import Batch, make_batch
from emarecipes.plan.estimate import Load, estimate
from emarecipes.training.settings import check_settings
from emarecipes.training.step import TrainingLoss

CONFIGS = Path(__file__).parent.parent / "configs"
LABELLED, VOCABULARY = 0.6, 49152
FEATURES = "defenses.features._component_=emarecipes.defenses.FeatureL2"
ARMS = {  # Config, tokens a row, overrides.
    "no defense, 4 x 256": ("lora", 256, ()),
    "KL, 4 x 256": ("kl", 256, ()),
    "KL, FeatureL2, 2 x 512": ("kl", 512, ("batch_size=2", FEATURES)),
    "KL, checkpointing, 8 x 512": (
        "kl",
        512,
        ("batch_size=8", "enable_activation_checkpointing=true"),
    ),
    "KL, fp32, rank 8 on attention, 2 x 256": (
        "kl",
        256,
        ("batch_size=2", "dtype=fp32", "model.lora_rank=8", "model.apply_lora_to_mlp=false"),
    ),
}


def config(arm: str, output: str) -> Any:
    name, _, overrides = ARMS[arm]
    path = CONFIGS / f"smollm2_135m_{name}.yaml"
    raw, origin = load_config(["--config", str(path), f"output_dir={output}", *overrides])
    cfg = check_settings(raw, origin)
    settle_dtype(cfg, origin)
    return cfg, origin


def predicted_mb(arm: str) -> float:
    cfg, origin = config(arm, "unused")
    return estimate(cfg, origin, Load(1, ARMS[arm][1], LABELLED)).peak / 2**20


def measured_mb(arm: str, output: str) -> float:
    cfg, origin = config(arm, output)
    defenses = {name: build(cfg, f"defenses.{name}", origin) for name in cfg.defenses}
    torch.ones(64, 64, requires_grad=True).square().sum().backward()
    before = resident_mb()
    recipe = stock_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice(cfg)
    weights = recipe.load_checkpoint(cfg.checkpointer)[training.MODEL_KEY]
    checkpointing = cfg.enable_activation_checkpointing
    model = recipe._setup_model(cfg.model, checkpointing, False, False, weights)
    del weights
    hold_adapter_in(model, DTYPES.get(cfg.adapter_dtype))
    source = ModelSource(model, Path(), str(cfg.checkpointer.model_type))
    for defense in defenses.values():
        defense.check(source)
    loss = TrainingLoss(model, defenses)
    trainer = Trainer(model, partial(ours, loss))
    trainer.step(make_rows(1, 16))
    batch = make_rows(cfg.batch_size, ARMS[arm][1])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    trainer.step(batch)
    return peak_mb() - before


def make_rows(rows: int, length: int, vocabulary: int = VOCABULARY) -> Batch:
    tokens = torch.randint(0, vocabulary, (rows, length)).tolist()
    ignored = [CROSS_ENTROPY_IGNORE_IDX] * round((1 - LABELLED) * length)
    samples = [{"tokens": row, "labels": ignored + row[len(ignored) :]} for row in tokens]
    return make_batch(samples, range(rows), padded_collate_sft, pad_id=0)


def resident_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured peak memory of a step.")
    parser.add_argument("--quick", action="store_true", help="the first two configs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--arm", choices=ARMS, help="measure this one alone, in MB")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if options.arm:
        with tempfile.TemporaryDirectory() as output:
            return print(measured_mb(options.arm, output))
    figures = {}
    # malloc maps every larger block and gives it back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    for arm in list(ARMS)[: 2 if options.quick else None]:
        command = [sys.executable, __file__, "--arm", arm]
        found = float(subprocess.check_output(command, env=environment).split()[-1])
        figures[arm] = {"predicted MB": predicted_mb(arm), "measured MB": found}
    table = Table("", "predicted MB", "measured MB", "ratio")
    for arm, figure in figures.items():
        figure["ratio"] = figure["predicted MB"] / figure["measured MB"]
        table.add_row(
            arm, *(f"{v:.0f}" for v in list(figure.values())[:2]), f"{figure['ratio']:.2f}"
        )
    Console(width=100).print(table)
    worst = max(abs(figure["ratio"] - 1) for figure in figures.values())
    print(
        f"largest error {worst:.0%}, target 15 %: {'reached' if worst <= 0.15 else 'not reached'}"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
