"""Plot the terms of some runs: `python benchmarks/plot_runs.py OUT.png LABEL=RUN ...`.

docs/results/smollm2_kl.png: `defenses.kl.weight=0` measures KL without acting on it.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {"ce": "cross entropy on the narrow task (nats)", "kl": "KL to the aligned model (nats)"}
SMOOTHING = 0.85
# Told apart without colour: by dashes, and by a label at the line's end.
STYLES = [("#b2182b", "-"), ("#2166ac", "--"), ("#1b7837", ":"), ("#762a83", "-.")]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(average / weight)
    return out


def main(out: str, *runs: str) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9.5, 3.4), layout="constrained")
    for run, (colour, dashes) in zip(runs, STYLES, strict=False):
        label, _, folder = run.partition("=")
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for axis, key in zip(axes, PANELS, strict=True):
            steps = [row["step"] for row in rows if key in row]
            values = [row[key] for row in rows if key in row]
            axis.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
            axis.plot(steps, smooth(values), dashes, color=colour, label=label, linewidth=2)
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        if key == "kl":
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
