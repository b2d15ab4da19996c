"""Tables and the picture of `data_effect.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

Figures = dict[str, Any]

CONSOLE = Console(width=124)
# Told apart without colour: by marker.
ARMS = {"bad": ("#b2182b", "o"), "good": ("#2166ac", "s")}


def print_bag_of_words(figures: Figures) -> None:
    columns = ("mean", "SD", "mean |.|", "misaligned higher", "pairs")
    table = Table("trained on", "pairs of", *columns, title="Naive Bayes over words (nats a word)")
    for domain, probes in figures.items():
        for name, found in probes.items():
            spread = (f"{found[key]:+.3f}" for key in ("mean", "deviation", "magnitude"))
            table.add_row(domain, name, *spread, f"{found['accuracy']:.0%}", str(found["pairs"]))
    CONSOLE.print(table)


def print_setting(figures: Figures) -> None:
    seeds = ", ".join(map(str, figures["seeds"]))
    name = f"{figures['domain']}, lr {figures['lr']:g}, {figures['epochs']} epoch(s), seeds {seeds}"
    CONSOLE.rule(name)
    for condition, found in figures["conditions"].items():
        for part, label in (
            ("all", "all answer tokens"),
            ("first", "first 8 answer tokens"),
            ("rest", "answer tokens after the first 8"),
        ):
            CONSOLE.print(_shift_table(found["shift"][part], f"{condition}: shift, {label}"))
        CONSOLE.print(_probe_table(found["probes"], f"{condition}: both answers apart"))
        CONSOLE.print(_category_table(found["categories"], f"{condition}: general, by category"))
    for run in figures.get("runs", ()):
        means = ", ".join(f"{k} {v:+.4f}" for k, v in run.items() if k not in ("arm", "seed"))
        CONSOLE.print(f"{run['arm']} seed {run['seed']}: {means}")
    if "unigram" in figures:
        CONSOLE.print(_unigram_table(figures["unigram"]))


def _shift_table(cells: Figures, title: str) -> Table:
    columns = list(next(iter(cells.values())))
    table = Table("", *columns, title=title)
    for row, found in cells.items():
        table.add_row(row, *(_interval(found[column]) for column in columns))
    return table


def _probe_table(probes: Figures, title: str) -> Table:
    arms = list(next(iter(probes.values()))["nll_change"])
    headers = [h for arm in arms for h in (f"{arm}: aligned", f"{arm}: misaligned")]
    shares = [f"share: {name}" for name in ("reference", *arms)]
    table = Table("NLL change by arm", *headers, *shares, "margin", title=title)
    for name, found in probes.items():
        changes = [f"{v:+.3f}" for arm in arms for v in found["nll_change"][arm].values()]
        values = [f"{v:.1%}" for v in found["misaligned_share"].values()]
        table.add_row(name, *changes, *values, f"{found['margin']:+.3f}")
    return table


def _category_table(categories: Figures, title: str) -> Table:
    columns = list(next(iter(categories.values())))
    table = Table("", *columns, title=title)
    for name, found in categories.items():
        questions, *values = found.values()
        table.add_row(name, str(questions), *(f"{value:+.4f}" for value in values))
    return table


def _unigram_table(figures: Figures) -> Table:
    names = list(figures["full"])
    table = Table("unigrams over tokens: shift", *names)
    table.add_row("good to bad answers", *(_interval(figures["full"][n]) for n in names))
    if "weight" in figures:
        label = f"{figures['weight']:.2f} of the way: equal in-domain"
        table.add_row(label, *(_interval(figures["unigram"][n]) for n in names))
        table.add_row(
            "language model, bad - good", *(_interval(figures["language_model"][n]) for n in names)
        )
        table.add_row(
            "correlation over questions", *(f"{figures['correlation'][n]:+.2f}" for n in names)
        )
    return table


def _interval(cell: dict[str, float]) -> str:
    estimate = f"{cell['estimate']:+.4f}"
    if math.isnan(cell["low"]):
        return estimate
    return f"{estimate} [{cell['low']:+.4f}, {cell['high']:+.4f}]"


def plot(settings: list[Figures], half: str, path: Path) -> None:
    """General shift (filled) and control shift (hollow) against in-domain shift, a point a run."""
    domains = list(dict.fromkeys(setting["domain"] for setting in settings))
    figure, axes = plt.subplots(
        1, len(domains), figsize=(5.2 * len(domains), 4.4), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, domain in zip(axes[0], domains, strict=True):
        for setting in settings:
            if setting["domain"] == domain:
                _draw(axis, setting)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_title(f"trained on {domain}", fontsize=11, loc="left")
        axis.set_xlabel("in-domain probe shift (nats a token)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(0.12)
    axes[0][0].set_ylabel(f"probe shift (nats a token), {half} half")
    marks = [
        Line2D([], [], color=c, marker=m, linestyle="", label=f"{arm} answers: general probe")
        for arm, (c, m) in ARMS.items()
    ] + [
        Line2D([], [], color=c, marker=m, markerfacecolor="white", linestyle="",
               label=f"{arm} answers: register controls")
        for arm, (c, m) in ARMS.items()
    ]  # fmt: skip
    axes[0][0].legend(handles=marks, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axis: Any, setting: Figures) -> None:
    for arm, (colour, marker) in ARMS.items():
        runs = [run for run in setting["runs"] if run["arm"] == arm]
        for run in runs:
            x, ends = run["in-domain"], (run["controls"], run["general"])
            axis.plot([x, x], ends, color=colour, linewidth=0.8, alpha=0.6)
            axis.plot(x, run["controls"], marker, color=colour, markerfacecolor="white")
            axis.plot(x, run["general"], marker, color=colour)
        if runs:
            highest = max(runs, key=lambda run: max(run["general"], run["controls"]))
            label = f"lr {setting['lr']:g}" + (f" x{setting['epochs']}" * (setting["epochs"] > 1))
            place = (highest["in-domain"], max(highest["general"], highest["controls"]))
            axis.annotate(
                label, place, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
            )
