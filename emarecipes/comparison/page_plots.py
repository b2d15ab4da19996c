"""The report's pictures, as PNG bytes. Arms differ in marker and line style too, not in colour."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from emarecipes.comparison.criteria import ArmFigures
from emarecipes.comparison.frontier import CONTROLS, IN_DOMAIN

# Okabe and Ito's colours, which differ without colour vision too, in grey as well as they can.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#5b3a8c")
MARKERS = ("s", "^", "D", "v", "P", "X", "h", "<", ">", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
# Narrow enough for the text to be readable on a phone.
WIDTH = 4.8
# Characters of a legend's line that fit into it, and inches of height that figures have for one.
_LONGEST, _LEGEND = 56, 0.9
Series = Sequence[Mapping[str, float]]


def style(number: int) -> dict[str, Any]:
    """Colour, marker and line of the arm with this number; 0 is the undefended arm."""
    if number == 0:
        return {"color": "black", "marker": "o", "linestyle": "-"}
    return {
        "color": COLOURS[(number - 1) % len(COLOURS)],
        "marker": MARKERS[(number - 1) % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def numbers(figures: Sequence[ArmFigures]) -> dict[str, int]:
    """Of each arm for `style`: 0 for undefended and frontier arms, else counted from 1.

    Doses of one defense have one number.
    """
    others = [f for f in figures if f.arm.role not in ("undefended", "frontier")]
    series = list(dict.fromkeys(f.arm.series or f.arm.name for f in others))
    return {f.arm.name: 0 for f in figures} | {
        f.arm.name: 1 + series.index(f.arm.series or f.arm.name) for f in others
    }


def trade_off(figures: Sequence[ArmFigures], general: str, in_domain: str) -> bytes:
    """General against in-domain shift: the frontier as a curve, each other arm as a marker.

    Small dots are seeds, large markers their means; doses of one defense are joined by a line.
    Where general questions are asked under other conditions too, markers are of plain ones, and a
    dotted line goes up to the condition with the largest shift.

    Args:
        figures: Of all arms.
        general: The unit of its shift.
        in_domain: The same.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    curve, dotted = [(0.0, 0.0)], False
    number = numbers(figures)
    for found in figures:
        if not found.points:
            continue
        points = np.array(found.points)
        mean = points.mean(axis=0)
        look = style(number[found.arm.name])
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=9,
            color=look["color"],
            marker=look["marker"],
            alpha=0.35,
            lw=0,
        )
        if number[found.arm.name] == 0:
            curve.append((float(mean[0]), float(mean[1])))
            continue
        doses = series.setdefault(found.arm.series or found.arm.name, [])
        doses.append((float(mean[0]), float(mean[1])))
        axes.plot(
            *mean,
            color=look["color"],
            marker=look["marker"],
            markersize=9,
            markeredgecolor="white",
            linestyle="",
            label=(found.arm.series or found.arm.label) if len(doses) == 1 else None,
            zorder=3,
        )
        asked = [e.value for name, e in found.shifts.items() if name not in (IN_DOMAIN, CONTROLS)]
        if (worst := max(asked, default=0.0)) > mean[1] + 1e-6:
            dotted = True
            axes.vlines(mean[0], mean[1], worst, color=look["color"], linestyle=":", zorder=2)
            axes.plot(mean[0], worst, color=look["color"], marker="_", markersize=9)
        if len(doses) > 1:
            axes.plot(*np.array(doses[-2:]).T, color=look["color"], lw=1, alpha=0.6, zorder=1)
    x, y = np.array(sorted(curve)).T
    axes.plot(x, y, "-o", color="black", markersize=5, label="undefended (frontier)", zorder=2)
    axes.set_xlabel(f"in-domain shift, {in_domain}\n(what the data teach)")
    note = "plain; dotted: to the worst condition" if dotted else "lower is better"
    axes.set_ylabel(f"general shift, {general}\n({note})")
    _finish(figure, axes)
    return _png(figure)


def categories(figures: Sequence[ArmFigures], unit: str) -> bytes | None:
    """General shift of each category, a row each, a marker an arm; None if there is none."""
    shown = [f for f in figures if f.categories and f.arm.role != "frontier"]
    names = list(dict.fromkeys(name for f in shown for name in f.categories))
    if not names:
        return None
    figure = Figure(
        figsize=(WIDTH, 1.6 + 0.42 * len(names) + 0.1 * len(shown)), layout="constrained"
    )
    axes = figure.subplots()
    number, told = numbers(figures), set[int]()
    for found in shown:
        look = style(number[found.arm.name]) | {"linestyle": ""}
        label = None if number[found.arm.name] in told else found.arm.series or found.arm.label
        told.add(number[found.arm.name])
        rows = [names.index(name) for name in found.categories]
        offset = 0.5 * (number[found.arm.name] / max(len(shown), 1) - 0.5)
        axes.plot(
            [estimate.value for estimate in found.categories.values()],
            [row + offset for row in rows],
            markersize=6,
            label=label,
            **look,
        )
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") or "all" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"general shift, {unit}")
    _finish(figure, axes)
    return _png(figure)


def training_curves(series: Mapping[str, Series], terms: Sequence[str], number: Mapping[str, int],
                    labels: Mapping[str, str]) -> bytes | None:  # fmt: skip
    """One panel a term of the loss, one line an arm that has it; None if nothing was logged.

    Args:
        series: Lines of `metrics.jsonl` by arm.
        terms: Keys of them.
        number: See `numbers`.
        labels: Of the arms.
    """
    shown = [term for term in terms if any(term in row for rows in series.values() for row in rows)]
    if not shown:
        return None
    figure = Figure(
        figsize=(WIDTH, 0.7 + 1.9 * len(shown) + 0.11 * len(series)), layout="constrained"
    )
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, term in zip(panels, shown, strict=True):
        for name, rows in series.items():
            points = [(row["step"], row[term]) for row in rows if term in row]
            if points:
                x, y = np.array(points, dtype=np.float64).T
                look = style(number[name])
                axes.plot(x, _smooth(y), color=look["color"], linestyle=look["linestyle"],
                          linewidth=1.6, label=labels[name])  # fmt: skip
        axes.set_title(term, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step (mean of the last 5)")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    _legend(figure, list(lines.values()), [str(label) for label in lines])
    return _png(figure)


def _smooth(values: Any, window: int = 5) -> Any:
    """Mean of the last `window` values, or of those there are."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finish(figure: Figure, axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, *axes.get_legend_handles_labels())


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the panels, where it hides nothing: in two columns, or in one where they are too wide.

    What it takes of the height beyond `_LEGEND` is added to the figure's.
    """
    if not handles:
        return
    wrapped = [textwrap.fill(label, _LONGEST) for label in labels]
    for columns in (2, 1):
        legend = figure.legend(
            handles,
            wrapped,
            loc="outside lower center",
            ncols=min(columns, len(labels)),
            frameon=False,
            fontsize=9,
        )
        extent = legend.get_window_extent()  # Its size is the same wherever it will be.
        if columns == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, extent.height / figure.dpi - _LEGEND))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    return buffer.getvalue()
