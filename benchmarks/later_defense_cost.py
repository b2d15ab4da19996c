"""What each defense that came after the paper costs: a step's time and memory over the undefended.

The setting of step_cost.py: SmolLM2-135M, 4 rows of 256 tokens, 40 % of them prompt, LoRA of rank
32. The arms take turns, round by round. A step's time is this process's processor time, which other
work on the machine moves less than the clock on the wall; the ratio is the median over rounds of a
step's time over that of the same round's undefended step. Memory is the peak over what was held
before the step, each arm in a process of its own. `--arm` takes the time of one arm and the
undefended one alone: no other model in the process, and many rounds in a few minutes.

Steps of one arm differ by a tenth and more. `--within` measures what is a pass of its own (a term
of the whole step or of the weights) inside the defended steps: a step's time over the same step's
without that pass. One arm after the other, no other model in the process; without memory.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from defense_cost import DEPTH, WIDTH, write_pair
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from step_cost import (
    Setting,
    Trainer,
    describe_machine,
    in_torchtune,
    measure_memory,
    peak_of_arm,
    step_options,
    verdict,
)
from torch import Tensor
from tqdm import tqdm

from emarecipes.defenses import (
    AnchoredSFT,
    AsFT,
    Defense,
    DirectionBlock,
    InoculationAdapter,
    KLToReference,
    PrefixAnchor,
    SpectralPenalty,
    SubspaceAblation,
    TokenConstraint,
)
from emarecipes.models.adapters.export import save_adapter
from emarecipes.training.step_terms import StepTerms
from emarecipes.training.weight_terms import WeightTerms

NONE = "no defense"


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
    "SpectralPenalty": (lambda s: SpectralPenalty(), False, 1.10),
    "SubspaceAblation, 3 layers, k = 4": (
        lambda s: SubspaceAblation([10, 15, 20], rank=4, basis="random"), False, 1.05,
    ),
    "DirectionBlock": (lambda s: DirectionBlock(vectors(s), 20), False, 1.40),
    "DirectionBlock, cached": (lambda s: DirectionBlock(vectors(s), 20), True, 1.10),
    "InoculationAdapter": (inoculation, False, 1.15),
    "AsFT": (aligned_pair, False, 1.15),
    "PrefixAnchor": (lambda s: PrefixAnchor(), False, 1.10),
    "TokenConstraint": (lambda s: TokenConstraint(), False, None),
    "TokenConstraint, cached": (lambda s: TokenConstraint(), True, 1.05),
    "AnchoredSFT": (lambda s: AnchoredSFT(), False, None),
}  # fmt: skip


def trainer(name: str, scratch: Path, dtype: str) -> tuple[Trainer, Setting]:
    folder = scratch / name.replace(" ", "_").replace(",", "")
    folder.mkdir()
    setting = Setting(str(folder), dtype)
    make, cached, _ = ARMS[name]
    defenses = {} if make is None else {"one": make(setting)}
    model = in_torchtune(setting, "ours", defenses, lambda _: Held() if cached else None)  # type: ignore[arg-type,return-value]
    return Trainer(*model), setting


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
    for name in tqdm(("SpectralPenalty", "AsFT", "PrefixAnchor"), "time", unit="arm"):
        one, setting = trainer(name, scratch, dtype)
        batch = setting.batch(rows)
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
        assert limit is not None
        cells = (f"{statistics.median(own for own, _ in found):.2f}", f"{ratio:.3f}")
        table.add_row(name, *cells, f"{min(ratios):.3f}, {max(ratios):.3f}", verdict(ratio, limit))
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {dtype}, {machine}")
    Console(width=120).print(table)


def main() -> None:
    parser = step_options("What each later defense costs.", ARMS)
    parser.add_argument("--within", action="store_true", help="see above")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    rows = 2 if options.quick else 4
    repetitions = 3 if options.quick else options.repetitions
    with tempfile.TemporaryDirectory() as scratch:
        if options.within:
            return print_within(Path(scratch), options.dtype, rows, repetitions)
        if options.memory:
            one, setting = trainer(options.arm, Path(scratch), options.dtype)
            batch = setting.batch(rows)
            return print(measure_memory(one, batch, batch))  # The first step fills a cache.
        machine = describe_machine()
        arms = (NONE, options.arm) if options.arm else tuple(ARMS)
        peaks = {name: peak_of_arm(name) for name in tqdm(arms, "memory", unit="arm")}
        made = {name: trainer(name, Path(scratch), options.dtype) for name in arms}
        batch = made[NONE][1].batch(rows)
        times: dict[str, list[float]] = {name: [] for name in arms}
        rounds = 1 + repetitions
        for repetition in tqdm(range(rounds), "time", unit="round"):
            for name, (one, _) in made.items():
                gc.collect()
                started = time.process_time()
                one.step(batch)
                if repetition:
                    times[name].append(time.process_time() - started)
    table = Table("", "CPU seconds", "time ratio", "lowest, highest", "memory ratio", "wanted")
    found = {}
    for name in arms:
        limit = ARMS[name][2]
        ratios = [own / plain for own, plain in zip(times[name], times[NONE], strict=True)]
        ratio, memory = statistics.median(ratios), peaks[name] / peaks[NONE]
        found[name] = {"seconds": statistics.median(times[name]), "ratio": ratio, "memory": memory}
        spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
        wanted = verdict(ratio, limit, options.quick) if limit else ""
        cells = (f"{found[name]['seconds']:.2f}", f"{ratio:.2f}", spread, f"{memory:.2f}", wanted)
        table.add_row(name, *cells)
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {options.dtype}, {machine}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "steps": found}, indent=2))


if __name__ == "__main__":
    main()
