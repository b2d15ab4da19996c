"""An epoch over ragged chat rows: torchtune's own, and ours with steps of similar length.

The same SmolLM2-135M-Instruct adapter as in step_cost.py, the same rows and batch size, no defense.
Rows have 180 tokens in the mean and 512 at most, 40 % of them unlabelled. torchtune's arm pads the
rows that meet in a random order; ours groups rows by length and pads to a multiple of 32, as the
shipped configs do. The arms take turns, each epoch in a fresh process, as every new length costs
time on a CPU: an epoch is timed from its first batch, the model being loaded. The machine must be
idle.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from step_cost import Setting, Trainer, describe_machine, in_torchtune, native_dtype
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft

from emarecipes.datasets.rows import Rows
from emarecipes.models.batch import make_batch

ARMS = {"torchtune's recipe": ("recipe", False, 1), "ours, grouped": ("ours", True, 32)}
MEAN, LONGEST, BATCH = 180, 512, 4
AT_LEAST = 1.5


def ragged_rows(setting: Setting, count: int, *, grouped: bool) -> Rows:
    text = setting.tokens
    draws = np.random.default_rng(0)
    # A gamma distribution of shape 2, cut off and shifted to its mean.
    lengths = np.minimum(draws.gamma(2.0, MEAN / 2, count) + 5, LONGEST).astype(int)
    samples = []
    for row, length in enumerate(lengths):
        start = row * 97 % (len(text) - LONGEST)
        tokens = text[start : start + max(int(length), 8)]
        ignored = [CROSS_ENTROPY_IGNORE_IDX] * int(0.4 * len(tokens))
        samples.append({"tokens": tokens, "labels": ignored + tokens[len(ignored) :]})
    return Rows(samples, dropped=0, grouped=grouped)


def epoch(arm: str, count: int) -> dict[str, float]:
    """Seconds, tokens and padding of one epoch."""
    kind, grouped, multiple = ARMS[arm]
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(scratch, native_dtype())
        rows = ragged_rows(setting, count, grouped=grouped)
        trainer = Trainer(*in_torchtune(setting, kind))
        tokens = padded = 0
        started = time.perf_counter()
        for step in rows.steps(BATCH, seed=0, epoch=0, shuffle=True):
            samples = [rows[row] for row in step]
            batch = make_batch(samples, step, padded_collate_sft, 0, multiple)
            tokens += batch.num_tokens
            padded += batch.conversation_BS.numel()
            trainer.step(batch)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens, "padding": 1 - tokens / padded}


def report(found: dict[str, list[dict[str, float]]], count: int) -> None:
    tokens = next(iter(found.values()))[0]["tokens"]
    table = Table("", "seconds", "from, to", "padding share", "time ratio")
    medians = {name: statistics.median(e["seconds"] for e in es) for name, es in found.items()}
    stock, ours = ARMS
    for name, epochs in found.items():
        seconds = [e["seconds"] for e in epochs]
        cells = (f"{medians[name]:.1f}", f"{min(seconds):.1f}, {max(seconds):.1f}")
        ratio = f"{medians[name] / medians[stock]:.2f}"
        table.add_row(name, *cells, f"{epochs[0]['padding']:.3f}", ratio)
    print(f"{count} rows of {tokens / (count // BATCH * BATCH):.0f} tokens, {BATCH} a step")
    Console(width=110).print(table)
    faster = medians[stock] / medians[ours]
    verdict = "reached" if faster >= AT_LEAST else "not reached"
    print(f"{ours} is {faster:.2f}x faster than {stock}, at least {AT_LEAST}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="An epoch over ragged rows.")
    parser.add_argument("--rows", type=int, default=200, help="rows of the epoch")
    parser.add_argument("--repetitions", type=int, default=3, help="epochs of each arm")
    parser.add_argument("--quick", action="store_true", help="one epoch of 60 rows")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--arm", choices=ARMS, help="print one epoch of this arm alone")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    count = 60 if options.quick else options.rows
    if options.arm:
        return print(json.dumps(epoch(options.arm, count)))
    machine = describe_machine()
    found: dict[str, Any] = {name: [] for name in ARMS}
    for _ in range(1 if options.quick else options.repetitions):
        for name, epochs in found.items():
            command = [sys.executable, *sys.argv, "--arm", name]
            epochs.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "arms": found}, indent=2))
    print(machine)
    report(found, count)


if __name__ == "__main__":
    main()
