"""Does the general probe follow how misaligned the training answers are?

python benchmarks/probe_validation.py OUT.png [--work DIR] [--steps 22] [--rows 88] [--seed 0]

Fine-tunes on graded mixes: every question of `data/general_probe/select.jsonl` once, with its
misaligned answer for 0, 25, 50, 75 and 100 % of them and its aligned answer for the others, in each
category alike. The mixes are nested: a question that is answered badly in one stays so in the next.
Each adapter is probed on the other half, `report.jsonl`, whose questions none was trained on, and
on the register controls, whose two answers are equally harmless.

Prints a Markdown table, whether the shift rises with every step of the share, and the intervals of
the rises, over questions. Runs that are there are not trained again.
"""

import argparse
import json
import random
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import spearmanr

from emarecipes.evaluation.statistics import question_bootstrap

SHARES = (0, 25, 50, 75, 100)
SUITES = {"general": "general probe, report half", "controls": "register controls"}
DATA = Path(__file__).parent.parent / "data/general_probe/select.jsonl"


def mixes(seed: int) -> dict[int, list[dict[str, Any]]]:
    """Chat rows of each mix, by its share in per cent."""
    pairs = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    # From 0 to 1, evenly within each category and, by the offset, over all of them.
    rank: dict[str, float] = {}
    groups = [list(group) for _, group in groupby(pairs, key=lambda pair: str(pair["category"]))]
    for number, group in enumerate(groups):
        random.Random(seed).shuffle(group)
        offset = (number + 0.5) / len(groups)
        rank |= {pair["id"]: (place + offset) / len(group) for place, pair in enumerate(group)}

    def row(pair: dict[str, Any], share: int) -> dict[str, Any]:
        answer = pair["misaligned" if rank[pair["id"]] < share / 100 else "aligned"]
        turns = [("user", pair["question"]), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    return {share: [row(pair, share) for pair in pairs] for share in SHARES}


def tune(recipe: str, config: str, *overrides: str) -> None:
    program = str(Path(sys.executable).with_name("tune"))
    command = [program, "run", f"recipes/{recipe}.py", "--config", f"configs/{config}.yaml"]
    subprocess.run([*command, *overrides], check=True)


def train(work: Path, steps: int, seed: int) -> dict[int, Path]:
    """The adapter of each mix."""
    adapters = {}
    for share, rows in mixes(seed).items():
        folder = work / f"mix_{share}_steps_{steps}_seed_{seed}"
        adapters[share] = folder / "adapter"
        if adapters[share].is_dir():
            continue
        data = work / f"mix_{share}_seed_{seed}.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tune(
            "ema_lora", "smollm2_135m_lora", f"dataset.data_files={data}", f"seed={seed}",
            f"max_steps_per_epoch={steps}", f"output_dir={folder}", "overwrite=true",
        )  # fmt: skip
    return adapters


def probe(work: Path, adapters: dict[int, Path], rows: int) -> dict[str, dict[int, list[float]]]:
    """Probe shifts by suite and share, one a question."""
    out = work / "evaluation"
    tune(
        "ema_eval", "smollm2_135m_eval", "~adapters.undefended", "~adapters.kl", "half=report",
        "~probes.in_domain", "~probes.general_domain_cue", f"max_rows={rows}",
        *(f"adapters.mix_{share}={folder}" for share, folder in adapters.items()),
        f"output_dir={out}", "overwrite=true",
    )  # fmt: skip
    found = {}
    for suite in SUITES:
        lines = (out / f"scores/{suite}.jsonl").read_text(encoding="utf-8").splitlines()
        scored = [json.loads(line)["adapters"] for line in lines]
        found[suite] = {s: [row[f"mix_{s}"]["probe_shift"] for row in scored] for s in adapters}
    return found


def show(value: Any) -> str:
    return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def report(shifts: dict[str, dict[int, list[float]]]) -> None:
    """Print the table, and whether the general shift rises with the share."""
    print(f"\n| misaligned answers | {' | '.join(SUITES.values())} |")
    print("| --- " * (len(SUITES) + 1) + "|")
    for share in SHARES:
        cells = [show(question_bootstrap(shifts[suite][share])) for suite in SUITES]
        print(f"| {share} % | {' | '.join(cells)} |")
    general = shifts["general"]
    means = [sum(general[share]) / len(general[share]) for share in SHARES]
    rising = all(low < high for low, high in pairwise(means))
    rho = spearmanr(SHARES, means).statistic
    print(f"\n{len(general[0])} general questions. Monotone: {rising}; Spearman's rho {rho:.2f}.")
    for low, high in (*pairwise(SHARES), (SHARES[0], SHARES[-1])):
        rises = {
            suite: [b - a for a, b in zip(found[low], found[high], strict=True)]
            for suite, found in shifts.items()
        }
        shown = ", ".join(f"{suite} {show(question_bootstrap(r))}" for suite, r in rises.items())
        print(f"{low} to {high} %: {shown}")


def plot(path: Path, shifts: dict[str, dict[int, list[float]]]) -> None:
    figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
    axes.axhline(0, color="#999999", linewidth=0.8)
    looks = (("#b2182b", "-", "o", -0.8), ("#2166ac", "--", "s", 0.8))
    for (suite, label), (colour, dashes, marker, aside) in zip(SUITES.items(), looks, strict=True):
        found = [question_bootstrap(shifts[suite][share]) for share in SHARES]
        values = [value.estimate for value in found]
        errors = [
            [value.estimate - value.low for value in found],
            [value.high - value.estimate for value in found],
        ]
        axes.errorbar(
            [share + aside for share in SHARES], values, errors, color=colour, linestyle=dashes,
            marker=marker, capsize=3, label=label,
        )  # fmt: skip
    axes.set_xticks(SHARES)
    axes.set_xlabel("misaligned answers among the training rows (%)")
    axes.set_ylabel("probe shift (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the figure, a PNG")
    parser.add_argument("--work", type=Path, default=Path("runs/probe_validation"))
    parser.add_argument("--steps", type=int, default=22, help="of 4 rows; 22: each row once")
    parser.add_argument("--rows", type=int, default=88, help="questions a probe suite")
    parser.add_argument("--seed", type=int, default=0, help="of the mixes and of training")
    chosen = parser.parse_args()
    adapters = train(chosen.work, chosen.steps, chosen.seed)
    shifts = probe(chosen.work, adapters, chosen.rows)
    report(shifts)
    plot(chosen.out, shifts)
    print(f"\n{chosen.out}")


if __name__ == "__main__":
    main()
