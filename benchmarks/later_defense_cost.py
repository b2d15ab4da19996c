"""What each defense costs: a step's time and memory over the undefended one, each in its process.

The setting of step_cost.py: SmolLM2-135M, 4 rows of 256 tokens that begin with the template's
prefix, 40 % of them prompt, LoRA of rank 32. Every arm has a process of its own, as a user's run
does; six at a time, the undefended one always among them, step by turns, round by round. A step's
time is its process's processor time, which other work on the machine moves less than the clock on
the wall (shown too); a ratio is the median over rounds of a step's over that of the same round's
undefended step. Memory is the peak over what was held before the step. `--arm` takes arms by name.

Steps of one arm differ by a tenth and more. `--within` measures what is a pass of its own (a term
of the whole step or of the weights) inside the defended steps: a step's time over the same step's
without that pass. One arm after the other, no other model in the process; without memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from defense_cost import DEPTH, WIDTH, write_pair
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from step_cost import Setting, in_torchtune, measure_memory, peak_of_arm, step_options, verdict
from timing import Trainer, Turns, answer_turns, describe_machine
from torch import Tensor
from tqdm import tqdm

from emarecipes.defenses import (
    AnchoredSFT,
    AsFT,
    Defense,
    DirectionBlock,
    FeatureL2,
    GradientSurgery,
    InoculationAdapter,
    KLToReference,
    PersonaSteering,
    PrefixAnchor,
    SpectralPenalty,
    SubspaceAblation,
    TokenConstraint,
)
from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.batch import Batch
from emarecipes.training.pages import keep_freed_pages
from emarecipes.training.step_terms import StepTerms
from emarecipes.training.weight_terms import WeightTerms

NONE, OTHER_ROWS = "no defense", "PrefixAnchor, other rows"


class Held:
    """What a full reference cache gives, without its reading: the first batch's states."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] | None = None

    def states(
        self, batch: object, select: object, forward: Callable[[], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        if self._states is None:
            self._states = forward()
        return self._states


def vectors(setting: Setting) -> str:
    path = Path(setting.cfg.output_dir) / "vectors.safetensors"
    torch.manual_seed(0)
    save_file({"persona": torch.randn(DEPTH + 1, WIDTH)}, path)
    return str(path)


def inoculation(setting: Setting) -> Defense:
    cfg, folder = setting.cfg, Path(setting.cfg.output_dir) / "adapter"
    where = (setting.meta_model, str(cfg.checkpointer.model_type), setting.base, folder)
    save_adapter(setting.adapter, *where, rank=cfg.model.lora_rank, alpha=cfg.model.lora_alpha)
    return InoculationAdapter(str(folder))


def aligned_pair(setting: Setting) -> Defense:
    folder = Path(setting.cfg.output_dir) / "pair"
    folder.mkdir()
    write_pair(folder, setting.base)
    # What is trained is the aligned one.
    return AsFT(str(folder / "aligned"), str(setting.base))


# Name: the defense, whether its reference is cached, and what the step may cost at most.
ARMS: dict[str, tuple[Callable[[Setting], Defense] | None, bool, float | None]] = {
    NONE: (None, False, None),
    "KL": (lambda s: KLToReference(), False, None),
    "KL, cached": (lambda s: KLToReference(), True, None),
    "FeatureL2": (lambda s: FeatureL2(), False, None),
    "PersonaSteering": (lambda s: PersonaSteering(vectors(s), layer=20, alpha=0.1), False, None),
    "SpectralPenalty": (lambda s: SpectralPenalty(), False, 1.10),
    "SubspaceAblation, 3 layers, k = 4": (
        lambda s: SubspaceAblation([10, 15, 20], rank=4, basis="random"), False, 1.05,
    ),
    "DirectionBlock": (lambda s: DirectionBlock(vectors(s), 20), False, 1.40),
    "DirectionBlock, cached": (lambda s: DirectionBlock(vectors(s), 20), True, 1.10),
    "InoculationAdapter": (inoculation, False, 1.15),
    "AsFT": (aligned_pair, False, 1.15),
    "PrefixAnchor": (lambda s: PrefixAnchor(), False, 1.10),
    OTHER_ROWS: (lambda s: PrefixAnchor(system="Be brief."), False, None),
    "TokenConstraint": (lambda s: TokenConstraint(), False, None),
    "TokenConstraint, cached": (lambda s: TokenConstraint(), True, 1.05),
    "AnchoredSFT": (lambda s: AnchoredSFT(), False, None),
    "KL on one safe row": (lambda s: KLToReference(samples="safe"), False, None),
    "GradientSurgery, one safe row": (lambda s: GradientSurgery(), False, None),
    "Muon": (None, False, None),
}  # fmt: skip
AT_A_TIME = 6
Step = tuple[float, float, float, float]  # Seconds, wall and processors'; of the undefended step.


def trainer(name: str, scratch: Path, dtype: str, rows: int) -> tuple[Trainer, Batch]:
    setting = Setting(str(scratch), dtype)
    make, cached, _ = ARMS[name]
    defenses = {} if make is None else {"one": make(setting)}
    model = in_torchtune(setting, "ours", defenses, lambda _: Held() if cached else None)  # type: ignore[arg-type,return-value]
    optimizer = torch.optim.Muon if name == "Muon" else torch.optim.AdamW
    return Trainer(*model, optimizer), setting.batch(rows, safe="safe" in name)


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """CPU seconds of each call that computes such a term and adds its gradient."""
    spent: list[float] = []
    kinds: tuple[Any, ...] = (StepTerms, WeightTerms)
    stock = [kind.backward for kind in kinds]

    def timed(backward: Callable[..., Any]) -> Callable[..., Any]:
        def measured(self: Any, factors: Any) -> Any:
            started = time.process_time()
            found = backward(self, factors)
            spent.append(time.process_time() - started)
            return found

        return measured

    for kind, backward in zip(kinds, stock, strict=True):
        kind.backward = timed(backward)
    try:
        yield spent
    finally:
        for kind, backward in zip(kinds, stock, strict=True):
            kind.backward = backward


def print_within(scratch: Path, dtype: str, rows: int, repetitions: int) -> None:
    table = Table("", "CPU seconds of the pass", "time ratio", "lowest, highest", "wanted")
    machine = describe_machine()
    for name in tqdm(("SpectralPenalty", "AsFT", OTHER_ROWS), "time", unit="arm"):
        folder = scratch / name
        folder.mkdir()
        one, batch = trainer(name, folder, dtype, rows)
        one.step(batch)
        found: list[tuple[float, float]] = []
        for _ in range(repetitions):
            with timed_passes() as spent:
                started = time.process_time()
                one.step(batch)
                whole = time.process_time() - started
            found.append((sum(spent), whole / (whole - sum(spent))))
        ratios = [ratio for _, ratio in found]
        ratio, limit = statistics.median(ratios), ARMS[name][2]
        cells = (f"{statistics.median(own for own, _ in found):.2f}", f"{ratio:.3f}")
        wanted = verdict(ratio, limit) if limit else ""
        table.add_row(name, *cells, f"{min(ratios):.3f}, {max(ratios):.3f}", wanted)
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {dtype}, {machine}")
    Console(width=120).print(table)


def by_turns(arms: Sequence[str], dtype: str, rows: int, rounds: int) -> dict[str, list[Step]]:
    """Each arm's steps, with the undefended step of the same round."""
    found: dict[str, list[Step]] = {}
    progress = tqdm(total=len(arms), desc="time", unit="arm")
    others = [name for name in arms if name != NONE]
    for first in range(0, len(others), AT_A_TIME - 1):
        group = [NONE, *others[first : first + AT_A_TIME - 1]]
        common = ("--child", "--dtype", dtype, "--rows", str(rows))
        turns = Turns({name: (*common, "--arm", name) for name in group})
        steps: dict[str, list[tuple[float, float]]] = {name: [] for name in group}
        for _ in range(rounds):
            for name in group:
                steps[name].append(turns.step(name))
        turns.end()
        for name in group:
            pairs = zip(steps[name], steps[NONE], strict=True)
            found[name] = [(*own, *plain) for own, plain in pairs]
        progress.update(len(group) - (first > 0))
    return found


def main() -> None:
    parser = step_options("What each defense costs.", ARMS, several=True)
    parser.add_argument("--within", action="store_true", help="see above")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, %(default)s")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    rows = 2 if options.quick else options.rows
    repetitions = 3 if options.quick else options.repetitions
    arms = [NONE, *(name for name in options.arm or ARMS if name != NONE)]
    with tempfile.TemporaryDirectory() as scratch:
        if options.within:
            return print_within(Path(scratch), options.dtype, rows, repetitions)
        if options.child or options.memory:
            if options.child:
                keep_freed_pages()
            one, batch = trainer(options.arm[-1], Path(scratch), options.dtype, rows)
            if options.child:
                return answer_turns(lambda: one.step(batch))
            return print(measure_memory(one, batch, batch))  # The first step fills a cache.
    machine = describe_machine()
    peaks = {name: peak_of_arm(name, options.dtype) for name in tqdm(arms, "memory", unit="arm")}
    steps = by_turns(arms, options.dtype, rows, repetitions)
    columns = ("CPU seconds", "time ratio", "lowest, highest", "on the wall", "memory", "wanted")
    table = Table("", *columns)
    found = {}
    for name in arms:
        limit = ARMS[name][2]
        ratios = [own / plain for _, own, _, plain in steps[name]]
        wall = statistics.median(own / plain for own, _, plain, _ in steps[name])
        seconds = statistics.median(own for _, own, _, _ in steps[name])
        ratio = statistics.median(ratios)
        memory = peaks[name] / peaks[NONE]
        found[name] = {"steps": steps[name], "ratio": ratio, "memory": memory}
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        wanted = verdict(ratio, limit, options.quick) if limit else ""
        cells = (f"{seconds:.2f}", f"{ratio:.2f}", spread, f"{wall:.2f}", f"{memory:.2f}", wanted)
        table.add_row(name, *cells)
    print(f"{256 * rows} tokens a step, {options.dtype}, {machine}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "arms": found}, indent=2))


if __name__ == "__main__":
    main()
