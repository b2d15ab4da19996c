"""What an evaluation says: figures with their intervals, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from emarecipes.evaluation.statistics import Interval, answer_bootstrap, share_bootstrap
from emarecipes.files import json_lines, write_json, write_text

SUMMARY, SCORES = "summary.json", "scores"
REFERENCE = "reference"


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
    """

    value: float
    question: Hashable
    category: str = ""


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
