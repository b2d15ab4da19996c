"""What the console shows of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emarecipes.evaluation.figures import SCORES, SUMMARY, Figure


def print_figures(
    figures: Sequence[Figure], folder: Path, sensitivity: Sequence[Figure] = ()
) -> None:
    """A table a suite, without its categories, and where the files are.

    Args:
        figures: In the order in which they are shown.
        folder: The evaluation's.
        sensitivity: Of judged suites, see `judge_rates.sensitivity`: a table an adapter and judge.
    """
    console = Console()
    for suite in dict.fromkeys(figure.suite for figure in figures):
        whole = [f for f in figures if f.suite == suite and f.category is None]
        console.print(_table(suite, whole))
        for reason, names in _withheld(whole).items():
            console.print(f"{', '.join(names)}: {reason}.", highlight=False, markup=False)
        points = [f for f in sensitivity if f.suite == suite]
        for adapter, judge in dict.fromkeys((f.adapter, f.judge) for f in points):
            title = f"{suite}, {adapter}, {judge}: misaligned, % of all / of coherent answers"
            found = [f for f in points if (f.adapter, f.judge) == (adapter, judge)]
            console.print(_sensitivity(title, found))
    console.print(
        "Intervals: 95 %, over questions alone. A probe shift is a change of likelihoods, not a "
        "rate of misaligned behaviour.",
        highlight=False,
    )
    for label, path in (("Figures:", folder / SUMMARY), ("Scores: ", folder / SCORES)):
        console.print(f"{label} {path}", highlight=False, soft_wrap=True, markup=False)


def _withheld(figures: Iterable[Figure]) -> dict[str, list[str]]:
    """Names of the figures without a value by the reason for it, with adapter and judge."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        if figure.reason is not None:
            whose = " by ".join(filter(None, (figure.adapter or "all", figure.judge)))
            found.setdefault(f"no value, {whose}: {figure.reason}", []).append(figure.figure)
    return found


def _table(suite: str, figures: Iterable[Figure]) -> Table:
    table = Table(title=Text(suite), box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("adapter")
    table.add_column("figure", min_width=len("nll_change_misaligned"))
    for heading in ("value", "low", "high", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit")
    last = None
    for figure in figures:
        adapter = figure.adapter or "all"
        name = figure.figure if figure.judge is None else f"{figure.figure} ({figure.judge})"
        table.add_row(
            Text(adapter if adapter != last else ""),
            Text(name),
            *(_number(value) for value in (figure.value, figure.low, figure.high)),
            str(figure.n),
            figure.unit,
        )
        last = adapter
    return table


def _sensitivity(title: str, points: Iterable[Figure]) -> Table:
    """Both misaligned rates: a row a threshold of coherence, a column one of alignment."""
    rows: dict[tuple[float, str], dict[float, list[str]]] = {}
    for point in points:
        assert point.thresholds is not None
        alignment, coherence, comparison = point.thresholds.values()
        shown = "-" if point.value is None else f"{100 * point.value:.1f}"
        rows.setdefault((coherence, comparison), {}).setdefault(alignment, []).append(shown)
    table = Table(title=Text(title), box=box.SIMPLE, title_justify="left", pad_edge=False)
    for heading in ("coherence", "alignment"):
        table.add_column(heading)
    for alignment in dict.fromkeys(alignment for row in rows.values() for alignment in row):
        table.add_column(f"{alignment:g}", justify="right", no_wrap=True)
    for (coherence, comparison), row in rows.items():
        above = ">" if comparison == "<" else ">="
        table.add_row(f"{above} {coherence:g}", comparison, *map(" / ".join, row.values()))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
