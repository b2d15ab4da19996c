"""Does the probe shift follow what a judge says of sampled answers, over adapters?

python benchmarks/probe_judged.py EVALUATION --judge openai/gpt-4o-mini --output DIR

EVALUATION is an `output_dir` of `recipes/ema_eval.py` with the general probe and the sampled
answers of at least 8 adapters, and the reference's answers (`answers.reference`) to the same
questions. The judge sees an adapter's answer and the reference's blind, as A and B, and says which
shows the worse values. Each pair is shown in both orders, so that a favourite place of the judge
cancels in each pair and not only on average; `--one-order` draws one and asks half as often.

Writes `judged.json`, `judged.png` and `judgements.jsonl`. Replies are in Inspect's cache for a
week: the same command goes on after an interruption and pays for nothing twice.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from omegaconf import OmegaConf
from pairwise import judge_pairs, read_evaluation
from pairwise_outcome import outcome
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from emarecipes.command import run_alone
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import plain
from emarecipes.evaluation.judging import print_bound
from emarecipes.files import write_text
from emarecipes.judges.calls import ask, check_judge
from emarecipes.judges.reply import Reply
from emarecipes.provenance import environment

RESULT = "judged.json"
# Of calls that may fail for good before the judge is given up.
MOST_FAILURES, FAILING_SHARE = 10, 0.05


def asker(options: argparse.Namespace) -> Any:
    """`ask` of the judge, which counts the calls and says what they cost before the first."""

    def ask_all(prompts: list[str]) -> list[Reply]:
        if len(prompts) > options.max_calls:
            raise UserError(
                f"--max-calls: {len(prompts)} calls are needed, more than {options.max_calls}; "
                "raise it, or take fewer answers or --one-order"
            )
        check_judge(options.judge)
        prices = {options.judge: options.price} if options.price else {}
        cfg = {"models": [options.judge], "max_tokens": options.max_tokens, "prices": prices}
        print_bound(OmegaConf.create(cfg), prompts, "--price")
        with tqdm(total=len(prompts), unit="call", desc=options.judge) as bar:
            return ask(
                options.judge, prompts, progress=bar.update, max_tokens=options.max_tokens,
                max_connections=options.max_connections, timeout=options.timeout,
                failures=min(MOST_FAILURES, int(FAILING_SHARE * len(prompts))),
            )  # fmt: skip

    return ask_all


def show(value: dict[str, float | None]) -> str:
    if value["estimate"] is None:
        return "none: one side is the same for all adapters"
    return "{estimate:+.3f} [{low:+.3f}, {high:+.3f}]".format(**value)


def report(found: dict[str, Any]) -> None:
    table = Table("adapter", f"{found['probe']} probe shift", "worse - better, judged", "pairs")
    for row in found["adapters"]:
        table.add_row(row["adapter"], show(row["shift"]), show(row["worse"]), str(row["pairs"]))
    console = Console(width=124, highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    console.print(
        f"Spearman's rho over {len(found['adapters'])} adapters: {show(found['spearman'])}"
    )
    share = found["share_a"]
    console.print(
        f"Judgements: {', '.join(f'{n} {kind}' for kind, n in found['verdicts'].items())}; share A "
        f"{'-' if share is None else f'{share:.2f}'} (0.50: no favourite place). Pairs: "
        f"{found['same_answer']} the same answer twice (ties, not asked), {found['left_out']} left "
        "out for want of a judgement."
    )
    if others := found["without_shift_or_answers"]:
        console.print(f"Not among them, for want of a shift or of answers: {', '.join(others)}")
    console.print(
        "Intervals: 95 %, of an adapter over questions, of rho over adapters and questions; with 8 "
        "adapters the latter says little."
    )


def plot(path: Path, found: dict[str, Any]) -> None:
    """A point an adapter, with both intervals."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
    for row in found["adapters"]:
        x, y = row["shift"], row["worse"]
        errors = [[[v["estimate"] - v["low"]], [v["high"] - v["estimate"]]] for v in (y, x)]
        axes.errorbar(
            x["estimate"], y["estimate"], *errors, color="#b2182b", ecolor="#d8a0a6", fmt="o",
            linewidth=1,
        )  # fmt: skip
        axes.annotate(
            row["adapter"], (x["estimate"], y["estimate"]), xytext=(5, 5), fontsize=8,
            textcoords="offset points", path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
    axes.set_title(f"Spearman's rho {show(found['spearman'])}", fontsize=10, loc="left")
    axes.set_xlabel(f"{found['probe']} probe shift (nats a token)")
    axes.set_ylabel("worse than the reference - better\n(share of pairs, judged blind)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(argv: Sequence[str]) -> None:
    options = parse(argv)
    folder: Path = options.output
    if (folder / RESULT).exists() and not options.overwrite:
        raise UserError(f"{folder} already holds {RESULT}; choose another --output or --overwrite")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file, not a folder")
    shifts, pairs, others = read_evaluation(options.evaluation, options.probe, options.answers)
    both = not options.one_order
    judged = judge_pairs(pairs, asker(options), seed=options.seed, both=both)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"judge": options.judge} | one.line()) + "\n" for one in judged]
    write_text(folder / "judgements.jsonl", "".join(lines))
    settings = {
        "evaluation": str(options.evaluation), "probe": options.probe, "answers": options.answers,
        "judge": options.judge, "orders": 2 if both else 1, "seed": options.seed,
    }  # fmt: skip
    found = plain(settings | outcome(shifts, pairs, judged, options.seed))
    found["without_shift_or_answers"] = others
    report(found)
    plot(folder / "judged.png", found)
    text = json.dumps({"versions": environment()} | found, indent=1, ensure_ascii=False)
    write_text(folder / RESULT, text + "\n")
    print(folder)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="output_dir of ema_eval.py")
    parser.add_argument("--judge", required=True, help="an Inspect provider string")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--probe", default="general", help="the probe suite")
    parser.add_argument("--answers", default="general", help="the answers' file, its stem")
    parser.add_argument("--one-order", action="store_true", help="each pair once, at random")
    parser.add_argument("--seed", type=int, default=0, help="of that order, and of resampling")
    parser.add_argument("--max-calls", type=int, default=2000, help="more are refused")
    parser.add_argument("--max-tokens", type=int, default=16, help="of a reply")
    parser.add_argument("--max-connections", type=int, help="calls at a time")
    parser.add_argument("--timeout", type=int, default=300, help="seconds of an attempt")
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="US$ a million tokens"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_alone("probe_judged", run, sys.argv[1:]))
