"""How a step's time and memory grow: measured slopes beside those that `emarecipes.plan` predicts.

One factor at a time is changed about a base point: SmolLM2's width with random weights, 8 layers, a
vocabulary of 16384, 4 rows of 128 tokens, LoRA of rank 32, KL. A slope is that of log(figure) over
log(factor), by least squares: 1 is proportional, 0 is no growth. Predicted time is operations.
Each point is measured in processes of its own: seconds, the median of five steps; MB, the peak of
resident memory from before the model was built (as in plan_check.py). The machine must be idle.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_check import CONFIGS, LABELLED, make_rows, resident_mb
from rich.console import Console
from rich.table import Table
from step_cost import Trainer, describe_machine, ours, peak_mb
from torch import nn

from emarecipes.components import build
from emarecipes.config import load_config
from emarecipes.defenses import ModelSource
from emarecipes.machine import DTYPES, settle_dtype
from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.plan.estimate import Load, estimate
from emarecipes.training.settings import check_settings
from emarecipes.training.step import TrainingLoss

BASE = {"rows": 4, "row tokens": 128, "vocabulary": 16384, "layers": 8, "rank": 32, "defenses": 1}
DEFENSES = (
    ("defenses.kl.weight=1.0",),
    ("defenses.features._component_=emarecipes.defenses.FeatureL2",),
    ("defenses.more._component_=emarecipes.defenses.KLToReference", "defenses.more.weight=0.5"),
)
AXES: dict[str, list[dict[str, int]]] = {
    "tokens a step (rows)": [{"rows": n} for n in (2, 4, 8, 16)],
    "row length, 2048 tokens a step": [
        {"row tokens": n, "rows": 2048 // n} for n in (128, 256, 512, 1024)
    ],
    "vocabulary": [{"vocabulary": n} for n in (16384, 32768, 65536, 131072)],
    "layers": [{"layers": n} for n in (4, 8, 16, 32)],
    "LoRA rank": [{"rank": n} for n in (16, 32, 64, 128)],
    "defenses": [{"defenses": n} for n in (1, 2, 3)],
}
FIGURES = ("seconds", "peak MB")


def config(point: dict[str, int]) -> Any:
    overrides = [
        f"batch_size={point['rows']}",
        f"model.num_layers={point['layers']}",
        f"model.vocab_size={point['vocabulary']}",
        f"model.lora_rank={point['rank']}",
        "output_dir=unused",
    ]
    for entry in DEFENSES[: point["defenses"]]:
        overrides += entry
    raw, origin = load_config(["--config", str(CONFIGS / "smollm2_135m_kl.yaml"), *overrides])
    cfg = check_settings(raw, origin)
    settle_dtype(cfg, origin)
    return cfg, origin


def predicted(point: dict[str, int]) -> dict[str, float]:
    cfg, origin = config(point)
    found = estimate(cfg, origin, Load(1, point["row tokens"], LABELLED))
    return {"seconds": found.flops, "peak MB": found.peak / 2**20}


def trainer_at(point: dict[str, int]) -> Trainer:
    cfg, origin = config(point)
    torch.set_default_dtype(DTYPES[cfg.dtype])
    model: nn.Module = build(cfg, "model", origin)
    torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora" in name)
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.02)
    hold_adapter_in(model, DTYPES.get(cfg.adapter_dtype))
    defenses = {name: build(cfg, f"defenses.{name}", origin) for name in cfg.defenses}
    source = ModelSource(model, Path(), str(cfg.checkpointer.model_type))
    for defense in defenses.values():
        defense.check(source)
    loss = TrainingLoss(model, defenses)
    return Trainer(model, partial(ours, loss))


def measure(point: dict[str, int], figure: str) -> float:
    torch.ones(64, 64, requires_grad=True).square().sum().backward()
    before = resident_mb()
    trainer = trainer_at(point)
    batch = make_rows(point["rows"], point["row tokens"], BASE["vocabulary"])
    trainer.step(make_rows(1, 16, BASE["vocabulary"]))
    if figure == "peak MB":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        trainer.step(batch)
        return peak_mb() - before
    trainer.step(batch)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measured(point: dict[str, int]) -> dict[str, float]:
    """Both figures; malloc maps every larger block where memory is measured, which takes time."""
    found = {}
    for figure in FIGURES:
        malloc = {"MALLOC_MMAP_THRESHOLD_": "131072"} if figure == "peak MB" else {}
        command = [sys.executable, __file__, "--point", json.dumps(point), "--figure", figure]
        found[figure] = float(subprocess.check_output(command, env=os.environ | malloc).split()[-1])
    return found


def slope(factors: list[float], values: list[float]) -> float:
    return float(np.polyfit(np.log(factors), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description="How a step's time and memory grow.")
    parser.add_argument("--quick", action="store_true", help="the first and last point of two axes")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--point", type=json.loads, help="measure this point alone")
    parser.add_argument("--figure", choices=FIGURES, help="with --point: what to measure")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if options.point:
        return print(measure(options.point, options.figure))
    axes = {name: points[:: len(points) - 1] for name, points in list(AXES.items())[:2]}
    print(describe_machine())
    known: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("", "from, to", *(f"{f}: {w}" for f in FIGURES for w in ("slope", "predicted")),
                  "seconds", "peak MB")  # fmt: skip
    for name, changes in (axes if options.quick else AXES).items():
        rows = []
        for change in changes:
            point = BASE | change
            key = json.dumps(point)
            if key not in known:
                known[key] = {"measured": measured(point), "predicted": predicted(point)}
            rows.append(known[key])
        factors = [float(next(iter(change.values()))) for change in changes]
        slopes = [
            f"{slope(factors, [row[kind][figure] for row in rows]):.2f}"
            for figure in FIGURES
            for kind in ("measured", "predicted")
        ]
        ends = [
            " to ".join(f"{row['measured'][figure]:.{digits}f}" for row in (rows[0], rows[-1]))
            for figure, digits in zip(FIGURES, (2, 0), strict=True)
        ]
        table.add_row(name, f"{factors[0]:.0f}, {factors[-1]:.0f}", *slopes, *ends)
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(known, indent=2))


if __name__ == "__main__":
    main()
