"""What the narrow data do to SmolLM2-135M: the probes' shifts, against controls of style.

Reads adapters in RUNS/<domain>_<arm>_lr<lr>_e<epochs>_s<seed>/adapter, arm bad or good, made by

    tune run recipes/ema_lora.py --config configs/smollm2_135m_lora.yaml \\
        dataset.data_files=data/<domain>/train_<arm>.jsonl seed=<seed> optimizer.lr=<lr> \\
        epochs=<epochs> output_dir=RUNS/<domain>_<arm>_lr<lr>_e<epochs>_s<seed>

then chooses a setting with `--half select` and reports with `--half report` on a folder that holds
the runs of the chosen settings alone:

    python benchmarks/data_effect.py --runs RUNS --half report --json FIGURES --plot PNG

Probe shift: the fall of NLL(misaligned) - NLL(aligned) against the model without adapter, in nats a
token; positive is towards misaligned. `bad - good` takes off what training on good answers to the
same questions does, `general - controls` what a change of style does. Likelihoods are kept beside
each adapter, so that a second call computes only what is new.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bag_of_words import UnigramOdds, spread, word_pairs, words
from data_effect_report import plot, print_bag_of_words, print_setting
from effect import (
    BAD,
    CONTROLS,
    GENERAL,
    GOOD,
    IN_DOMAIN,
    STRONG_CONTROLS,
    Measured,
    category_shifts,
    probe_figures,
    shift_cells,
    shifts,
    unigram_figures,
)
from numpy.typing import NDArray

from emarecipes.components import build
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.scoring import Scorer
from emarecipes.models.model_checks import check_checkpoint_files, check_model
from emarecipes.probes.contrast import pair_nll, tokenize_pairs
from emarecipes.probes.pairs import (
    CONDITIONS,
    Condition,
    ContrastPair,
    make_condition,
    read_contrast_file,
    read_sibling_files,
)
from emarecipes.training.settings import check_settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "smollm2_135m_lora.yaml"
DOMAINS = ("home_computing", "home_repair")
HALVES = ("select", "report")
_NAME = re.compile(
    rf"(?P<domain>{'|'.join(DOMAINS)})_(?P<arm>bad|good)"
    r"_lr(?P<lr>[^_]+)_e(?P<epochs>\d+)_s(?P<seed>\d+)"
)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    domain: str
    arm: str
    lr: float
    epochs: int
    seed: int
    folder: Path


def find_runs(folder: Path) -> list[Run]:
    """The finished runs in a folder; their configs must say what their names say."""
    runs = []
    for path in sorted(folder.glob("*/adapter/adapter_model.safetensors")):
        run_folder = path.parent.parent
        name = _NAME.fullmatch(run_folder.name)
        if name is None:
            print(f"skipped, not named <domain>_<arm>_lr<lr>_e<epochs>_s<seed>: {run_folder}")
            continue
        lr, epochs, seed = float(name["lr"]), int(name["epochs"]), int(name["seed"])
        cfg = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
        data = Path(cfg["dataset"]["data_files"])
        found = (data.parent.name, data.name, cfg["optimizer"]["lr"], cfg["epochs"], cfg["seed"])
        if found != (name["domain"], f"train_{name['arm']}.jsonl", lr, epochs, seed):
            raise UserError(f"{run_folder}: its config.yaml is of another run than its name says")
        runs.append(Run(name["domain"], name["arm"], lr, epochs, seed, run_folder))
    if not runs:
        raise UserError(f"{folder}: holds no adapters of the expected names")
    return runs


def by_setting(runs: Iterable[Run]) -> list[dict[str, dict[int, Run]]]:
    """Runs by arm and seed, for each domain, rate and number of epochs.

    Where a setting has both arms, only the seeds that both have are kept.
    """
    groups: dict[Any, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        groups[run.domain, run.epochs, run.lr][run.arm][run.seed] = run
    kept = []
    for _, arms in sorted(groups.items()):
        seeds = sorted(set.intersection(*(set(found) for found in arms.values())))
        if seeds:
            kept.append({a: {s: arms[a][s] for s in seeds} for a in (BAD, GOOD) if a in arms})
        else:
            folders = ", ".join(
                run.folder.name for found in arms.values() for run in found.values()
            )
            print(f"skipped, no seed of both arms: {folders}")
    return kept


class Bench:
    """The model, the data, and the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        raw, origin = load_config(["--config", str(CONFIG), f"dtype={options.dtype}"])
        cfg = check_settings(raw, origin)
        check_checkpoint_files(cfg, origin)
        self.tokenizer = build(cfg, "tokenizer", origin)
        self.options = options
        self._scorer = Scorer(cfg, check_model(cfg, origin), self.tokenizer.pad_id)
        self.halves = {
            half: read_contrast_file(ROOT / f"data/general_probe/{half}.jsonl") for half in HALVES
        }
        self.general = self.halves[options.half]
        controls = ROOT / "data/register_controls"
        self.controls = {
            CONTROLS: read_contrast_file(controls / "controls.jsonl"),
            STRONG_CONTROLS: read_contrast_file(controls / "strong.jsonl"),
        }
        self.training = {domain: self._siblings(domain, "train") for domain in DOMAINS}
        self.heldout = {domain: self._siblings(domain, "heldout") for domain in DOMAINS}

    def _siblings(self, domain: str, name: str) -> list[ContrastPair]:
        good, bad = (ROOT / f"data/{domain}/{name}_{arm}.jsonl" for arm in (GOOD, BAD))
        return read_sibling_files(good, bad, category=domain)

    def probes(self, domain: str) -> dict[str, list[ContrastPair]]:
        """By name. The controls take part in reporting only."""
        controls = self.controls if self.options.half == "report" else {}
        return {GENERAL: self.general, **controls, IN_DOMAIN: self.heldout[domain]}

    def condition(self, name: str, domain: str) -> Condition:
        prompt = self.options.training_system_prompt
        return make_condition(
            name,
            system_prompt=prompt if name == "training_system_prompt" else None,
            training_questions=[pair.question for pair in self.training[domain]],
        )

    def measure(
        self, arms: dict[str, dict[int, Run]], domain: str, condition: str
    ) -> dict[str, Measured]:
        """By probe. In-domain questions and strong controls are asked plainly only."""
        around = self.condition(condition, domain)
        found = {}
        for name, pairs in self.probes(domain).items():
            if name in (IN_DOMAIN, STRONG_CONTROLS) and condition != "none":
                continue
            rows = tokenize_pairs(pairs, around, self.tokenizer)
            cache = self.options.runs / "reference_nll.npz"
            found[name] = Measured(pair_nll(self._scorer.token_nlls(rows, None, cache)))
            for arm, runs in arms.items():
                found[name].arms[arm] = [
                    pair_nll(
                        self._scorer.token_nlls(
                            rows, run.folder / "adapter", run.folder / "probe_nll.npz"
                        )
                    )
                    for run in runs.values()
                ]
        return found


def setting_figures(bench: Bench, arms: dict[str, dict[int, Run]]) -> Figures:
    """Everything about one domain, learning rate and number of epochs."""
    seeds = list(next(iter(arms.values())))
    first = next(iter(arms.values()))[seeds[0]]
    figures: Figures = {"domain": first.domain, "lr": first.lr, "epochs": first.epochs}
    figures |= {"seeds": seeds, "arms": list(arms), "conditions": {}}
    for condition in bench.options.conditions:
        probes = bench.measure(arms, first.domain, condition)
        parts: Sequence[Any] = ("all", "first", "rest")
        cells = {part: shift_cells(probes, part) for part in parts}
        figures["conditions"][condition] = {
            "shift": {
                part: {
                    row: {c: asdict(i) for c, i in columns.items()} for row, columns in c.items()
                }
                for part, c in cells.items()
            },
            "probes": {name: probe_figures(measured) for name, measured in probes.items()},
            "categories": category_shifts(probes[GENERAL], [p.category for p in bench.general]),
        }
        if condition == "none":
            figures["runs"] = [
                {"arm": arm, "seed": seed, "t": t_value(shifts(probes[GENERAL])[arm][row])}
                | {name: float(shifts(m)[arm][row].mean()) for name, m in probes.items()}
                for arm in arms
                for row, seed in enumerate(seeds)
            ]
            figures["unigram"] = unigram_figures(token_differences(bench, first.domain), probes)
    return figures


def t_value(shift_N: NDArray[np.float64]) -> float:
    """The mean over questions in units of its standard error: what the setting is chosen by."""
    return float(shift_N.mean() / (shift_N.std(ddof=1) / np.sqrt(len(shift_N))))


def token_differences(bench: Bench, domain: str) -> dict[str, Any]:
    """Log-odds differences of each probe's pairs under unigrams over the model's tokens."""
    encode, training = bench.tokenizer.encode, bench.training[domain]
    odds = UnigramOdds(
        (encode(pair.misaligned) for pair in training), (encode(pair.aligned) for pair in training)
    )
    return {
        name: odds.differences((encode(p.aligned), encode(p.misaligned)) for p in pairs)
        for name, pairs in bench.probes(domain).items()
    }


def bag_of_words_figures(bench: Bench) -> Figures:
    """By training domain and probe: the spread that naive Bayes over words gives its pairs."""
    general = [pair for half in bench.halves.values() for pair in half]
    found: Figures = {}
    for domain, training in bench.training.items():
        odds = UnigramOdds(
            (words(pair.misaligned) for pair in training),
            (words(pair.aligned) for pair in training),
        )
        probes = {GENERAL: general, **bench.controls, IN_DOMAIN: bench.heldout[domain]}
        found[domain] = {
            name: asdict(spread(odds.differences(word_pairs(pairs)))) | {"pairs": len(pairs)}
            for name, pairs in probes.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What the narrow data do to SmolLM2-135M.")
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs")
    parser.add_argument("--half", choices=HALVES, required=True)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=["none"])
    parser.add_argument("--training-system-prompt", help="for the condition of that name")
    parser.add_argument("--only", default="", help="text that a run folder's name must contain")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the base")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="PNG: general against in-domain shift by run")
    options = parser.parse_args()
    if options.plot and (options.half != "report" or "none" not in options.conditions):
        parser.error("--plot shows the report half under the condition none")
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        runs = [run for run in find_runs(options.runs) if options.only in run.folder.name]
        bench = Bench(options)
        figures: Figures = {
            "half": options.half,
            "dtype": options.dtype,
            "torch": torch.__version__,
        }
        figures["bag_of_words"] = bag_of_words_figures(bench)
        print_bag_of_words(figures["bag_of_words"])
        figures["settings"] = []
        for arms in by_setting(runs):
            figures["settings"].append(setting_figures(bench, arms))
            print_setting(figures["settings"][-1])
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(figures["settings"], options.half, options.plot)


if __name__ == "__main__":
    main()
