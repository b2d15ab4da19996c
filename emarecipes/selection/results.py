"""What a selection leaves behind: scores, the selected rows, a plot, and a table on the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emarecipes.datasets.rows import provenance_of
from emarecipes.files import json_lines, whole, write_text
from emarecipes.selection.candidates import (
    Candidate,
    Floats,
    by_gap,
    correlations,
    relative_gap,
    text_of,
)
from emarecipes.selection.checked import CheckedSelection
from emarecipes.selection.score_file import ADDED

_SHOWN = 10
_LEAST_TEXT = 20
_COLUMNS = (("rank", 4), ("gap", 7), ("aligned", 7), ("misaligned", 10), ("tokens", 6))
_BINS = (10, 40)
# Beyond these percentiles a gap is drawn in the outermost bin.
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Ranking:
    """The scored candidates and their order.

    Attributes:
        candidates: N, in the file's order.
        aligned_N: Mean NLL under the aligned model.
        misaligned_AN: The same under each misaligned one.
        gap_N: See `relative_gap`.
        order: Rows of these that are eligible, from the highest gap to the lowest.
        num_selected: How many from the start of `order` are selected.
    """

    candidates: list[Candidate]
    aligned_N: Floats
    misaligned_AN: Floats
    gap_N: Floats
    order: list[int]
    num_selected: int

    @property
    def selected(self) -> list[int]:
        """Rows of `candidates` that are selected, by rank."""
        return self.order[: self.num_selected]


def rank_candidates(run: CheckedSelection) -> Ranking:
    """Rank a run's candidates, all of which have been scored."""
    scores = [run.file.scores[candidate.index] for candidate in run.scored]
    aligned_N = np.array([score.nll_aligned for score in scores])
    misaligned_AN = np.array(
        [[score.nll_adapters[name] for score in scores] for name in run.cfg.adapters]
    )
    gap_N = relative_gap(aligned_N, misaligned_AN, float(run.cfg.eps))
    eligible_N = np.array(
        [not (c.copy or (c.refusal and run.cfg.refusal_filter)) for c in run.scored]
    )
    order = by_gap(gap_N, eligible_N)
    return Ranking(run.scored, aligned_N, misaligned_AN, gap_N, order, run.num_selected)


def write_results(run: CheckedSelection) -> None:
    """Write `scores.jsonl`, `gap.png`, `selected.jsonl` and, last, `config.yaml`; print the table.

    Each file is written whole or not at all. A folder without `config.yaml` is not finished.
    """
    ranking = rank_candidates(run)
    folder = Path(run.cfg.output_dir)
    ranks = {row: rank for rank, row in enumerate(ranking.order, start=1)}
    run.file.finish(
        {
            candidate.index: {
                "id": candidate.row.get("id"),
                "gap": float(ranking.gap_N[row]),
                "refusal": candidate.refusal,
                "copy": candidate.copy,
                "rank": ranks.get(row),
                "selected": ranks.get(row, run.num_selected + 1) <= run.num_selected,
            }
            for row, candidate in enumerate(ranking.candidates)
        }
    )
    _plot(ranking, folder / "gap.png")
    lines = [
        ranking.candidates[row].row
        | dict(zip(ADDED, (float(ranking.gap_N[row]), ranks[row]), strict=True))
        for row in ranking.selected
    ]
    write_text(folder / "selected.jsonl", json_lines(lines))
    provenance = provenance_of(run.rows, [Path(run.cfg.candidates)], 1)
    resolved = OmegaConf.merge(run.cfg, {"provenance": provenance})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(resolved))
    print_ranking(run, ranking)


def _plot(ranking: Ranking, path: Path) -> None:
    """Histogram of the gap: the selected part, the rest, and refusals outlined."""
    low, high = np.percentile(ranking.gap_N, _PERCENTILES)
    gap_N = np.clip(ranking.gap_N, low, high)
    bins = int(np.clip(2 * len(gap_N) ** 0.5, *_BINS))
    edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
    is_selected = np.zeros(len(gap_N), dtype=bool)
    is_selected[ranking.selected] = True
    is_refusal = np.array([candidate.refusal for candidate in ranking.candidates])
    threshold = ranking.gap_N[ranking.selected[-1]]

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(
        [gap_N[is_selected], gap_N[~is_selected]],
        bins=list(edges),
        stacked=True,
        color=["#2a6f97", "#c9d3da"],
        label=[f"selected ({is_selected.sum()})", f"not selected ({(~is_selected).sum()})"],
    )
    if is_refusal.any():
        axes.hist(
            gap_N[is_refusal],
            bins=list(edges),
            histtype="step",
            linewidth=1.6,
            color="#d1495b",
            label=f"refusals among them ({is_refusal.sum()})",
        )
    axes.axvline(np.clip(threshold, low, high), color="#2a6f97", linestyle="--", linewidth=1.0)
    axes.set_xlabel("gap: (NLL misaligned - NLL aligned) / NLL aligned")
    axes.set_ylabel("candidates")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def print_ranking(run: CheckedSelection, ranking: Ranking) -> None:
    """Print the top and bottom rows, how the gap goes with length, and where the results are."""
    count = len(ranking.order)
    top = min(_SHOWN, count)
    bottom = min(_SHOWN, count - top)
    title = f"{count} candidates by gap, {ranking.num_selected} selected; NLL in nats a token"
    table = Table(title=title, box=box.SIMPLE)
    for heading, width in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("answer")
    console = Console()
    room = max(_LEAST_TEXT, console.width - sum(width + 3 for _, width in _COLUMNS) - 4)
    for place in [*range(top), *range(count - bottom, count)]:
        row = ranking.order[place]
        candidate = ranking.candidates[row]
        table.add_row(
            str(place + 1),
            f"{ranking.gap_N[row]:.4f}",
            f"{ranking.aligned_N[row]:.3f}",
            f"{ranking.misaligned_AN[:, row].mean():.3f}",
            str(candidate.tokens),
            _short_answer(candidate, run.cfg.conversation_column, room),
            style="bold" if place < ranking.num_selected else None,
            end_section=place == top - 1,
        )
    console.print(table)
    refusals = sum(candidate.refusal for candidate in run.candidates)
    treated = "left out" if run.cfg.refusal_filter else "kept: refusal_filter is false"
    for line in (
        f"Refusals: {refusals} of {len(run.candidates)} candidates, {treated}.",
        f"{run.rows.dropped} candidates have no answer token left (max_seq_len)."
        if run.rows.dropped
        else "",
        _correlations(ranking.gap_N, ranking.candidates),
        f"Selected rows: {Path(run.cfg.output_dir) / 'selected.jsonl'}",
    ):
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _correlations(gap_N: NDArray[np.float64], candidates: Sequence[Candidate]) -> str:
    tokens_N = np.array([candidate.tokens for candidate in candidates], dtype=np.float64)
    spearman, pearson = correlations(gap_N, tokens_N)
    return (
        f"Correlation of gap and answer length: Spearman {spearman:.2f}, Pearson {pearson:.2f} "
        f"({len(gap_N)} candidates)."
    )


def _short_answer(candidate: Candidate, column: str, room: int) -> Text:
    answers = [m["content"] for m in candidate.row[column] if m["role"] == "assistant"]
    text = " ".join(text_of(answers[0]).split())
    return Text(text if len(text) <= room else f"{text[: room - 3]}...")
