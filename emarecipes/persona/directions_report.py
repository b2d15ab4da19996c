"""What directions from an adapter show and leave behind."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from emarecipes.datasets.rows import file_fingerprints
from emarecipes.persona.directions_checked import RESULT_FILES, CheckedDirections
from emarecipes.persona.report import write_vectors
from emarecipes.persona.written import VECTORS, result_folder
from emarecipes.provenance import environment

_TABLE_ROWS = 12


@dataclass(frozen=True)
class LayerShift:
    """Figures of one residual index.

    Attributes:
        layer: 0 for the embeddings, l for the stream after l layers.
        change: Root mean square of held-out answers' change, over that of the stream.
        mean_change: |mean change| of the other answers, over the same.
        held: Share of held-out answers' squared change that lies in the directions; nan: no change.
        random: The share that as many random directions hold on average, R / D.
    """

    layer: int
    change: float
    mean_change: float
    held: float
    random: float


def print_result(run: CheckedDirections, layers: Sequence[LayerShift]) -> None:
    """Print some layers' figures, and where everything is."""
    table = Table(title=escape(f"Where {run.cfg.adapter} moves the residual stream"))
    for heading in ("layer", "change / RMS", "mean change / RMS", "held", "random"):
        table.add_column(heading, justify="right")
    every = math.ceil(len(layers) / _TABLE_ROWS)
    for shift in layers[::every]:
        figures = (shift.change, shift.mean_change, shift.held, shift.random)
        cells = (f"{figure:.3f}" if math.isfinite(figure) else "-" for figure in figures)
        table.add_row(str(shift.layer), *cells)
    console = Console()
    console.print(table)
    held_out = int(run.held_out_N.sum())
    console.print(
        f"Directions of {len(run.rows) - held_out} answers; 'change' and 'held', the share of the "
        f"squared change that lies in them, are of {held_out} others.",
        soft_wrap=True,
    )
    path = Path(run.cfg.output_dir) / VECTORS
    console.print(f"Directions: {path}", highlight=False, soft_wrap=True, markup=False)


def write_result(
    run: CheckedDirections, vectors: dict[str, Tensor], layers: Sequence[LayerShift]
) -> None:
    """Write the result folder: every file is whole or not there, the directions come last.

    Raises:
        UserError: The disk refuses.
    """
    cfg = run.cfg
    model = Path(str(cfg.checkpointer.checkpoint_dir)).resolve().name
    counts = {"rows": len(run.rows), "held_out": int(run.held_out_N.sum())}
    provenance = {**environment(), "data_files": file_fingerprints(run.data_files)}
    figures = {
        "model": model,
        "adapter": str(cfg.adapter),
        "seed": cfg.seed,
        "counts": counts,
        "layers": [
            {k: v if math.isfinite(v) else None for k, v in asdict(s).items()} for s in layers
        ],
    }
    made_with = {"model": model, "adapter": str(cfg.adapter), "seed": str(cfg.seed)}
    made_with |= {key: str(count) for key, count in counts.items()}
    with result_folder(Path(cfg.output_dir), RESULT_FILES) as staging:
        resolved = OmegaConf.to_yaml(OmegaConf.merge(cfg, {"provenance": provenance}))
        (staging / "config.yaml").write_text(resolved, encoding="utf-8")
        text = json.dumps(figures, indent=2) + "\n"
        (staging / "directions.json").write_text(text, encoding="utf-8")
        plot(layers, f"{Path(cfg.adapter).parent.name or cfg.adapter}, {model}", staging)
        write_vectors(vectors, made_with, staging)


def plot(layers: Sequence[LayerShift], title: str, folder: Path) -> None:
    """Draw what the directions hold, and how far the stream is moved, over the residual indices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = [shift.layer for shift in layers]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(numbers, [shift.held for shift in layers], label="these directions, other answers")
    random = [shift.random for shift in layers]
    top.plot(numbers, random, color="gray", linestyle="--", label="as many random directions")
    top.set(ylabel="share of the squared change", ylim=(0.0, 1.03), title=title.replace("$", r"\$"))
    top.legend(fontsize="small")
    bottom.plot(numbers, [shift.change for shift in layers], color="C3", label="change")
    means = [shift.mean_change for shift in layers]
    bottom.plot(numbers, means, color="C3", linestyle=":", label="mean change")
    bottom.set(xlabel="layers passed (0: embeddings)", ylabel="over the stream's RMS norm")
    bottom.set_ylim(bottom=0.0)
    bottom.legend(fontsize="small")
    figure.savefig(folder / "directions.png", dpi=120)
