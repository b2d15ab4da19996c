"""What the reference costs: KL and all terms, without a cache and with a full one.

Setting, fairness and caveats are those of step_cost.py, but memory is that of a later step. The
cache holds the batch's states in the run's dtype; a step reads them from disk, or from what the
operating system keeps of it. KL from the cache must be KL without one, bit for bit.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from defense_cost import defenses
from rich.console import Console
from rich.table import Table
from step_cost import (
    Defenses,
    Model,
    Setting,
    Trainer,
    describe_machine,
    in_torchtune,
    in_transformers,
    measure_memory,
    measure_time,
    peak_of_arm,
    print_promises,
    step_options,
)

from emarecipes.models.batch import Batch
from emarecipes.training.reference_cache import (
    ReferenceCache,
    reference_layers,
    reference_positions,
)
from emarecipes.training.row_store import StoreLayout, open_store

PLAIN, NAIVE = "no defense", "PEFT, naive KL"
ALL = "KL + FeatureL2 + PersonaSteering"
Batches = Sequence[Batch]
PROMISES = [  # Figure, arm, over which arm, at most.
    ("seconds", "KL", PLAIN, 1.45),
    ("seconds", "KL, cached", PLAIN, 1.12),
    ("seconds", f"{ALL}, cached", PLAIN, 1.18),
    ("peak MB", "KL", PLAIN, 1.10),
    ("peak MB", "KL, cached", PLAIN, 1.10),
    ("peak MB", f"{ALL}, cached", PLAIN, 1.10),
    ("seconds", "KL", NAIVE, 0.62),
    ("seconds", "KL, cached", NAIVE, 0.50),
    ("peak MB", "KL", NAIVE, 0.65),
]


def ours(setting: Setting, batches: Batches, names: str, compiled: bool = False) -> Model:
    return in_torchtune(setting, "ours", defenses(names), compiled=compiled)


def cached(setting: Setting, batches: Batches, names: str, compiled: bool = False) -> Model:
    cache = partial(cache_for, setting, batches)
    return in_torchtune(setting, "ours", defenses(names), cache, compiled)


def cache_for(setting: Setting, batches: Batches, made: Defenses) -> ReferenceCache:
    folder = Path(tempfile.mkdtemp(dir=setting.cfg.output_dir))
    entries = list(made.values())
    vectors_N = np.zeros(1 + max(row for batch in batches for row in batch.rows), dtype=np.int64)
    layers = len(reference_layers(entries))
    for batch in batches:
        final_BS, hidden_BS = reference_positions(entries, batch)
        vectors_N[batch.rows] = (final_BS.sum(1) + layers * hidden_BS.sum(1)).numpy()
    layout = StoreLayout(vectors_N, width=576, dtype=setting.dtype)
    return ReferenceCache(open_store(folder / "cache", {}, layout, ""), entries, setting.dtype)


ARMS: dict[str, Callable[[Setting, Batches], Model]] = {
    PLAIN: partial(ours, names=""),
    "KL": partial(ours, names="KL"),
    "KL, cached": partial(cached, names="KL"),
    f"{ALL}, cached": partial(cached, names=ALL),
    NAIVE: lambda setting, batches: in_transformers(setting, naive=True),
}
COMPILED = {
    "KL, compile: true": partial(ours, names="KL", compiled=True),
    "KL, cached, compile: true": partial(cached, names="KL", compiled=True),
}


def build(name: str, setting: Setting, batches: Batches) -> Trainer:
    model, backward = (ARMS | COMPILED)[name](setting, batches)
    for batch in batches:  # Fills a cache, if there is one.
        backward(batch)
    model.zero_grad(set_to_none=True)
    return Trainer(model, backward)


def report(figures: Any, quick: bool) -> None:
    columns = {"KL": 4, "seconds": 2, "IQR": 2, "peak MB": 0}
    table = Table("", *columns, "time ratio", "memory ratio")
    for name, figure in figures.items():
        cells = (f"{figure[key]:.{n}f}" if key in figure else "" for key, n in columns.items())
        measured = (key for key in ("seconds", "peak MB") if key in figure)
        ratios = (f"{figure[key] / figures[PLAIN][key]:.2f}" for key in measured)
        table.add_row(name, *cells, *ratios)
    Console(width=120).print(table)
    print_promises(figures, PROMISES, quick)
    for name in COMPILED if figures.keys() >= COMPILED.keys() else ():
        ratio = figures[name]["seconds"] / figures[NAIVE]["seconds"]
        print(f"seconds: {name} / {NAIVE} = {ratio:.2f}")
    if figures["KL, cached"]["KL"] != figures["KL"]["KL"]:
        sys.exit("KL from the cache is another than without it")


def main() -> None:
    parser = step_options("Time and memory of KL with a reference cache.", ARMS)
    parser.add_argument("--compiled", action="store_true", help="two compiled arms more, for time")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(scratch, options.dtype)
        batch, small = setting.batch(rows=2 if options.quick else 4), setting.batch(1, length=16)
        small.rows = [len(batch.rows)]  # In a cache it is a row of its own.
        if options.memory:
            trainer = build(options.arm, setting, (small, batch))
            return print(measure_memory(trainer, small, batch))
        machine = describe_machine()
        peaks = {name: peak_of_arm(name, options.dtype) for name in ARMS}
        timed = [*ARMS, *COMPILED] if options.compiled else ARMS
        trainers = {name: build(name, setting, [batch]) for name in timed}
        figures = measure_time(trainers, batch, 3 if options.quick else options.repetitions, peaks)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "arms": figures}, indent=2))
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {options.dtype}, {machine}")
    report(figures, options.quick)


if __name__ == "__main__":
    main()
