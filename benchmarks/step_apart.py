"""A step of each way to train, every one in a process of its own, as a user's is; by turns.

The setting of step_cost.py, where all models share one process and its allocator. Here an arm's
process steps when its turn comes and sleeps else. A ratio is the median over rounds of an
arm's seconds over another's in the same round: of seconds on the wall, and of all threads'
processor seconds, which a neighbour on the host disturbs less. Ours keep freed pages, as the
recipe does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path

import cache_cost
import step_cost
from rich.console import Console
from rich.table import Table
from step_cost import DTYPES, Setting, Trainer
from timing import Turns, answer_turns, describe_machine, native_dtype

from emarecipes.training.pages import keep_freed_pages

STOCK, OURS, KL, CACHED = "torchtune's recipe", "ours, no defense", "ours, KL", "ours, KL cached"
PEFT, NAIVE = "PEFT", "PEFT, naive KL"
ARMS = [STOCK, OURS, KL, CACHED, PEFT, NAIVE]
WANTED = [(OURS, STOCK, 0.60), (OURS, PEFT, 0.90), (KL, OURS, 1.45), (CACHED, OURS, 1.10),
          (KL, NAIVE, 0.65)]  # fmt: skip


def child(name: str, dtype: str) -> None:
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if name.startswith("ours"):
        keep_freed_pages()
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(scratch, dtype)
        batch = setting.batch(rows=4)
        if name == CACHED:
            trainer = cache_cost.build("KL, cached", setting, [batch])
        else:
            trainer = Trainer(*step_cost.ARMS[name](setting))
        answer_turns(partial(trainer.step, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each arm")
    parser.add_argument("--dtype", choices=list(DTYPES), default=native_dtype(), help="%(default)s")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="all by default")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return child(options.arm, options.dtype)
    machine = describe_machine()
    turns = Turns({n: ("--arm", n, "--dtype", options.dtype) for n in options.arms})
    seconds: dict[str, list[float]] = {name: [] for name in options.arms}
    worked: dict[str, list[float]] = {name: [] for name in options.arms}
    for _ in range(options.repetitions):
        for name in options.arms:
            wall, processors = turns.step(name)
            seconds[name].append(wall)
            worked[name].append(processors)
    turns.end()
    if options.json:
        found = {"machine": machine, "variables": _narrowed(), "seconds": seconds}
        found["processor_seconds"] = worked
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(f"1024 tokens a step, {options.dtype}, {machine} {_narrowed() or ''}")
    table = Table("", "seconds", "least", "most", "processor seconds")
    for name, of in seconds.items():
        figures = (statistics.median(of), min(of), max(of), statistics.median(worked[name]))
        table.add_row(name, *(f"{value:.2f}" for value in figures))
    Console(width=120).print(table)
    for name, over, limit in WANTED:
        if name in seconds and over in seconds:
            ratio, cpu = _ratio(seconds, name, over), _ratio(worked, name, over)
            reached = "reached" if ratio <= limit else "not reached"
            print(f"{name} / {over} = {ratio:.3f}, at most {limit:.2f}: {reached}; CPU {cpu:.3f}")


def _ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    rounds = zip(seconds[name], seconds[over], strict=True)
    return statistics.median(one / other for one, other in rounds)


def _narrowed() -> dict[str, str]:
    """Variables that keep wide instructions unused, see narrow_instructions.py."""
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    return {name: os.environ[name] for name in names if name in os.environ}


if __name__ == "__main__":
    main()
