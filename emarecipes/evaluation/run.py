"""The command behind `recipes/ema_eval.py`: check, score, write, ask judges, show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from emarecipes.command import run_alone
from emarecipes.config import find_input
from emarecipes.errors import UserError
from emarecipes.evaluation.checked import CheckedEvaluation
from emarecipes.evaluation.figures import (
    EVAL_CONFIG,
    REFERENCE,
    SUMMARY,
    Figure,
    print_figures,
    write_scores,
    write_summary,
)
from emarecipes.evaluation.scoring import NotFiniteError, Scorer
from emarecipes.evaluation.suite import Line, Suite, kind_of, pieces
from emarecipes.evaluation.suite_context import Model
from emarecipes.files import write_text
from emarecipes.output_dir import held
from emarecipes.progress import Progress
from emarecipes.provenance import environment

LIKELIHOODS = "likelihoods"


def run_eval(argv: Sequence[str]) -> int:
    """Evaluate adapters as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("ema_eval", lambda arguments: evaluate(CheckedEvaluation(arguments)), argv)


def evaluate(run: CheckedEvaluation) -> None:
    """Score, write the result's files, and print the figures.

    What may fail for reasons of its own comes last, and what was found before is written first: a
    judge that fails costs nothing that was computed.

    Raises:
        UserError: Another process writes there; a likelihood is not finite, of an adapter after
            all others were evaluated and written; or a suite failed for good.
    """
    with held(Path(run.cfg.output_dir), run.origin.at("output_dir")):
        _evaluate(run)


def _evaluate(run: CheckedEvaluation) -> None:
    evaluation = _Evaluation(run)
    evaluation.start()
    models = evaluation.models()
    for suite in run.suites:
        if suite.may_fail and evaluation.figures:
            evaluation.write()
        evaluation.add(suite, models)
    evaluation.write()
    print_figures(evaluation.figures, evaluation.folder, evaluation.sensitivity)
    evaluation.tell_same()
    if evaluation.failed:
        raise UserError("; ".join(entry["reason"] for entry in evaluation.failed))


class _Evaluation:
    def __init__(self, run: CheckedEvaluation) -> None:
        self.run, self.cfg = run, run.cfg
        self.folder = Path(run.cfg.output_dir)
        self.scorer = Scorer(
            run.cfg,
            run.source,
            run.tokenizer.pad_id,
            batch_size=run.cfg.batch_size,
            pad_to_multiple_of=run.cfg.pad_to_multiple_of,
        )
        self.figures: list[Figure] = []
        self.sensitivity: list[Figure] = []
        self.suites: dict[str, dict[str, Any]] = {}
        self.adapters = dict(run.adapters)  # Without those that failed.
        self.failed: list[dict[str, str]] = []

    def start(self) -> None:
        """Remove an earlier summary, so that none stands beside scores of another run."""
        (self.folder / SUMMARY).unlink(missing_ok=True)
        resolved = OmegaConf.merge(self.cfg, {"provenance": environment()})
        write_text(self.folder / EVAL_CONFIG, OmegaConf.to_yaml(resolved))

    def models(self) -> dict[str, Model]:
        """The base and every adapter under which the rows of all suites have finite likelihoods.

        Rows of all suites in one pass, so that batches are full and an adapter is loaded once.
        """
        rows = [row for suite in self.run.suites for row in suite.rows]
        folders: dict[str, Path | None] = {REFERENCE: None, **self.run.adapters}
        caches, tokenizer, origin = self.folder / LIKELIHOODS, self.run.tokenizer, self.run.origin
        found = {
            name: Model(name, adapter, self.scorer, tokenizer, caches, origin)
            for name, adapter in folders.items()
        }
        missing = {name: model.missing(rows) for name, model in found.items()}
        done, total = 0, sum(missing.values())
        with Progress(total=total, unit="row", disable=total == 0) as bar:
            for name, model in list(found.items()):
                try:
                    model.token_nlls(rows, bar=bar)
                except NotFiniteError as error:
                    if model.adapter is None:
                        raise
                    del self.adapters[name], found[name]
                    reason, folder = f"adapters.{name}: {error}", str(model.adapter)
                    self.failed.append({"adapter": name, "folder": folder, "reason": reason})
                done += missing[name]
                bar.update(done - bar.n)  # Past the rows of one that failed.
        return found

    def add(self, suite: Suite, models: dict[str, Model]) -> None:
        """Score a suite, and write its scores."""
        lines: dict[str, list[Line]] = {}
        for name, part in pieces(suite, suite.score(models), {*models, *self.run.answers}):
            if name in self.suites and name not in lines:
                raise UserError(f"{suite.key}: there is another suite {name}; rename one")
            self.figures += part.figures
            self.sensitivity += part.sensitivity
            lines.setdefault(name, []).extend(part.lines)
            self.suites[name] = dict(part.description)
        for name, rows in lines.items():
            if rows:  # A group of tasks has figures alone.
                write_scores(self.folder, name, rows)
            described = self.suites[name]
            described.setdefault("kind", kind_of(suite))
            described.setdefault("files", {})
            described.setdefault("questions", len({row["id"] for row in rows}))

    def tell_same(self) -> None:
        """Two names for one adapter: what tells them apart had no effect, or a path is wrong."""
        names: dict[str, list[str]] = {}
        for name, path in self.adapters.items():
            names.setdefault(self.scorer.adapter_fingerprint(path), []).append(name)
        for same in names.values():
            if len(same) > 1:
                print(f"{' and '.join(same)} are the same adapter: their files do not differ.")

    def write(self) -> None:
        """Write `summary.json`."""
        base = find_input(str(self.cfg.checkpointer.checkpoint_dir))
        head = {
            "versions": environment(),
            "base": {
                "folder": base,
                "dtype": self.cfg.dtype,
                "fingerprint": self.scorer.base_fingerprint,
            },
            "date": self.cfg.tokenizer.get("date"),
            "adapters": {
                name: {"folder": str(path), "fingerprint": self.scorer.adapter_fingerprint(path)}
                for name, path in self.adapters.items()
            },
            "failed": self.failed,
            "suites": self.suites,
            "sensitivity": [vars(figure) for figure in self.sensitivity],
        }
        write_summary(self.folder, head, self.figures)
