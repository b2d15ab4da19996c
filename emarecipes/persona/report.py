"""What an extraction shows and leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from emarecipes.datasets.rows import file_fingerprints
from emarecipes.errors import disk_errors
from emarecipes.files import open_to_others
from emarecipes.persona.checked import RESULT_FILES
from emarecipes.persona.written import VECTORS, result_folder
from emarecipes.provenance import environment

_SETTINGS = (
    "prompts",
    "samples_per_question",
    "max_new_tokens",
    "temperature",
    "top_k",
    "batch_size",
    "keep",
    "judge",
    "max_calls",
    "held_out_questions",
    "seed",
    "device",
    "dtype",
)
_KEEP_RULES = {
    "likelihood": "answers likelier, by mean token log-likelihood, under their own system prompt "
    "than under the opposite one",
    "all": "all answers, unfiltered",
    "judge": "answers that the judge graded >= 50 (positive) or < 50 (negative) for the trait, and "
    ">= 50 for coherence, if their counterpart under the opposite prompt was too",
}
_TABLE_ROWS = 12


@dataclass(frozen=True)
class LayerFigures:
    """Figures of one residual index.

    Attributes:
        layer: 0 for the embeddings, l for the stream after l layers.
        norm: |v|.
        residual_rms: Root mean square of the residual stream's norm over the answers' tokens.
        auc: Of held-out answers' projections on v, read behind their own system prompts.
        auc_se: Its standard error, over held-out questions; nan of one alone.
        auc_kept: The same AUC of the kept ones among them.
        auc_question_alone: The same of all, read behind the question without a system prompt.
        auc_random: As `auc`, for the random vector.
    """

    layer: int
    norm: float
    residual_rms: float
    auc: float
    auc_se: float
    auc_kept: float
    auc_question_alone: float
    auc_random: float

    @property
    def ratio(self) -> float:
        """|v| over the residual stream's RMS norm."""
        return self.norm / self.residual_rms


@dataclass
class Result:
    """Everything that is written."""

    cfg: DictConfig
    trait: str
    counts: dict[str, dict[str, int]]
    layers: list[LayerFigures]
    vectors: dict[str, Tensor]
    answers: list[dict[str, Any]]

    @property
    def best(self) -> LayerFigures:
        """The index of the highest AUC without system prompts; of several the first.

        A maximum over layers on few answers: somewhat too high.
        """
        return max(self.layers, key=lambda figures: figures.auc_question_alone)


def print_result(result: Result, folder: Path) -> None:
    """Print counts, some layers' figures, and where everything is."""
    every = math.ceil(len(result.layers) / _TABLE_ROWS)
    table = Table(title=escape(f"Persona vectors: {result.trait}"))
    headings = ("layer", "|v|", "|v| / RMS", "AUC", "kept", "question alone", "random")
    for heading in headings:
        table.add_column(heading, justify="right")
    for figures in result.layers:
        has_error = math.isfinite(figures.auc_se)
        if figures.layer % every and figures is not result.best:
            continue
        table.add_row(
            str(figures.layer),
            f"{figures.norm:.3g}",
            f"{figures.ratio:.3f}",
            f"{figures.auc:.3f}" + (f" ± {figures.auc_se:.3f}" if has_error else ""),
            f"{figures.auc_kept:.3f}",
            f"{figures.auc_question_alone:.3f}",
            f"{figures.auc_random:.3f}",
            style="bold" if figures is result.best else "",
        )
    console = Console()
    console.print(table)
    for side, counts in result.counts.items():
        console.print(
            f"{side}: {counts['sampled']} answers sampled, {counts['kept']} kept; "
            f"{counts['in_vector']} in the vector, {counts['held_out']} held out"
        )
        if result.cfg.keep == "judge":
            console.print(
                f"{side}: replies without a score: {counts['unparsable_trait']} for the trait, "
                f"{counts['unparsable_coherence']} for coherence"
            )
    console.print(f"Kept: {_KEEP_RULES[result.cfg.keep]}.", soft_wrap=True)
    console.print(
        "AUC: held-out questions. 'AUC', 'kept' and 'random' read answers behind system prompts "
        "that the vector was made with, whose own trace counts; 'question alone' is without them "
        "(bold: its highest).",
        soft_wrap=True,
    )
    console.print(
        f"Vectors: {folder / 'vectors.safetensors'}", highlight=False, soft_wrap=True, markup=False
    )


def write_result(result: Result, folder: Path) -> None:
    """Write the result folder: every file is whole or not there, the vectors come last.

    Raises:
        UserError: The disk refuses.
    """
    with result_folder(folder, RESULT_FILES) as staging:
        _write_config(result, staging / "config.yaml")
        _write_figures(result, staging / "persona.json")
        if result.cfg.save_answers:
            lines = (json.dumps(answer, ensure_ascii=False) for answer in result.answers)
            (staging / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(result, staging / "persona.png")
        write_vectors(result.vectors, _vector_metadata(result), staging)


def write_vectors(vectors: dict[str, Tensor], made_with: dict[str, str], staging: Path) -> None:
    """Write `vectors.safetensors` into a result's folder.

    Raises:
        UserError: The disk refuses.
    """
    with disk_errors(staging.parent):
        save_file(vectors, staging / VECTORS, metadata=made_with)
    open_to_others(staging / VECTORS)


def plot(result: Result, path: Path) -> None:
    """Draw AUC and |v| / RMS over the residual indices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [figures.layer for figures in result.layers]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    auc = [figures.auc for figures in result.layers]
    error = [figures.auc_se for figures in result.layers]
    has_error = all(map(math.isfinite, error))
    if has_error:
        top.fill_between(
            layers,
            [max(0.0, a - e) for a, e in zip(auc, error, strict=True)],
            [min(1.0, a + e) for a, e in zip(auc, error, strict=True)],
            alpha=0.2,
        )
    top.plot(layers, auc, label="own system prompt" + " (± standard error)" * has_error)
    alone = [figures.auc_question_alone for figures in result.layers]
    top.plot(layers, alone, label="question alone")
    random = [figures.auc_random for figures in result.layers]
    top.plot(layers, random, color="gray", linestyle="--", label="random vector, own system prompt")
    top.axhline(0.5, color="black", linewidth=0.5)
    top.set(ylabel="AUC of held-out answers", ylim=(0.0, 1.03))
    top.legend(loc="lower right", fontsize="small")
    title = f"Persona vectors: {result.trait}, {_model_name(result)}"
    top.set_title(title.replace("$", r"\$"))
    bottom.plot(layers, [figures.ratio for figures in result.layers], color="C3")
    bottom.set(xlabel="layers passed (0: embeddings)", ylabel="|v| / RMS norm of the stream")
    bottom.set_ylim(bottom=0.0)
    figure.savefig(path, dpi=120)


def _write_config(result: Result, path: Path) -> None:
    fingerprint = file_fingerprints([Path(result.cfg.prompts)])
    provenance = {**environment(), "data_files": fingerprint}
    resolved = OmegaConf.merge(result.cfg, {"provenance": provenance})
    path.write_text(OmegaConf.to_yaml(resolved), encoding="utf-8")


def _write_figures(result: Result, path: Path) -> None:
    figures = {
        "trait": result.trait,
        "model": _model_name(result),
        "settings": {key: result.cfg[key] for key in _SETTINGS},
        "kept": _KEEP_RULES[result.cfg.keep],
        "counts": result.counts,
        "highest_auc_question_alone": result.best.layer,
        "layers": [
            {k: _number(v) for k, v in {**asdict(f), "ratio": f.ratio}.items()}
            for f in result.layers
        ],
    }
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _vector_metadata(result: Result) -> dict[str, str]:
    return {
        "trait": result.trait,
        "model": _model_name(result),
        "keep": result.cfg.keep,
        **({"judge": result.cfg.judge} if result.cfg.keep == "judge" else {}),
        "positive_answers": str(result.counts["positive"]["in_vector"]),
        "negative_answers": str(result.counts["negative"]["in_vector"]),
        "seed": str(result.cfg.seed),
    }


def _model_name(result: Result) -> str:
    return Path(str(result.cfg.checkpointer.checkpoint_dir)).resolve().name


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None
