"""What an evaluation says: figures with their intervals, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emarecipes.evaluation.statistics import Interval, answer_bootstrap, share_bootstrap
from emarecipes.files import json_lines, write_json, write_text

SUMMARY, SCORES, EVAL_CONFIG = "summary.json", "scores", "eval.yaml"
REFERENCE = "reference"
NATS = "nats a token"


@dataclass(frozen=True)
class Figure:
    """One line of `summary.json`; docs/evaluate.md says what each field is."""

    adapter: str | None
    suite: str
    figure: str
    category: str | None
    value: float | None
    low: float | None
    high: float | None
    n: int
    questions: int
    unit: str
    thresholds: Mapping[str, Any] | None = None
    judge: str | None = None
    reason: str | None = None

    def withheld(self, reason: str) -> Figure:
        """The same without a value, for a reason other than that there is nothing to average."""
        return replace(self, value=None, low=None, high=None, n=0, questions=0, reason=reason)


@dataclass(frozen=True)
class Item:
    """One value of a figure: a question's, or an answer's.

    Attributes:
        value: NaN where there is none; it is then left out.
        question: What it belongs to; questions are what is resampled.
        category: Its own figure's, or "".
        id: Its own name among the values of an adapter; a comparison pairs by it.
    """

    value: float
    question: Hashable
    category: str = ""
    id: str = ""


def make_figures(
    items: Iterable[Item], adapter: str, suite: str, figure: str, unit: str, **extra: Any
) -> list[Figure]:
    """The mean over all items, and over those of each category where there are several.

    Args:
        items: The values.
        adapter: See `Figure`.
        suite: See `Figure`.
        figure: See `Figure`.
        unit: `share` for values that are 0 or 1, see `share_bootstrap`.
        extra: `thresholds`, `judge`.
    """
    kept = list(items)
    names = list(dict.fromkeys(item.category for item in kept))
    parts: list[tuple[str | None, list[Item]]] = [(None, kept)]
    if len(names) > 1:
        parts += [(name, [i for i in kept if i.category == name]) for name in names]
    return [
        _figure(part, adapter, suite, figure, category, unit, extra) for category, part in parts
    ]


def _figure(
    items: list[Item],
    adapter: str,
    suite: str,
    figure: str,
    category: str | None,
    unit: str,
    extra: Mapping[str, Any],
) -> Figure:
    present = [item for item in items if not math.isnan(item.value)]
    questions = [item.question for item in present]
    value = low = high = None
    if present:
        mean: Callable[[ArrayLike, Sequence[Hashable]], Interval]
        mean = share_bootstrap if unit == "share" else answer_bootstrap
        interval = mean(np.array([item.value for item in present]), questions)
        value = interval.estimate
        if not math.isnan(interval.low):
            low, high = interval.low, interval.high
    return Figure(
        adapter, suite, figure, category, value, low, high, len(present), len(set(questions)), unit,
        **extra,
    )  # fmt: skip


def write_scores(folder: Path, suite: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write `scores/<suite>.jsonl`; values that are not finite become null."""
    path = folder / SCORES / f"{suite}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_lines(map(plain, lines)))


def write_summary(folder: Path, head: Mapping[str, Any], figures: Iterable[Figure]) -> None:
    """Write `summary.json`.

    Args:
        folder: The evaluation's.
        head: All keys but `figures`.
        figures: In the order in which they are shown.
    """
    summary = {**head, "figures": [asdict(figure) for figure in figures]}
    write_json(folder / SUMMARY, plain(summary), indent=1, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Rounded to 6 digits, with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


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
