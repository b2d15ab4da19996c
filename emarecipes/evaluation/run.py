"""The command behind `recipes/ema_eval.py`: check, score, write, ask judges, show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from emarecipes.command import run_alone
from emarecipes.config import find_input
from emarecipes.datasets.rows import file_fingerprints
from emarecipes.errors import UserError
from emarecipes.evaluation.benign import answer_problems, opswap_figures, opswap_lines
from emarecipes.evaluation.checks import CheckedEvaluation
from emarecipes.evaluation.coherence import coherence_figures, coherence_lines
from emarecipes.evaluation.figures import (
    REFERENCE,
    SUMMARY,
    Figure,
    write_scores,
    write_summary,
)
from emarecipes.evaluation.harness import (
    harness_figures,
    harness_lines,
    harness_suites,
    run_harness,
)
from emarecipes.evaluation.judge_rates import Thresholds, agreement, judge_figures, sensitivity
from emarecipes.evaluation.judging import judge_lines
from emarecipes.evaluation.probes import probe_figures, probe_lines
from emarecipes.evaluation.report import print_figures
from emarecipes.evaluation.scoring import NotFiniteError, Scorer
from emarecipes.evaluation.settings import ANSWERS, HARNESS, JUDGE, OPSWAP, TRAITS_OF
from emarecipes.evaluation.traits import trait_figures, trait_lines
from emarecipes.files import write_text
from emarecipes.probes.contrast import PairNLL, pair_nll
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

    What needs no judge is written first: a judge that fails costs nothing that was computed.

    Raises:
        UserError: A likelihood is not finite, of an adapter after all others were evaluated and
            written; or a judge failed for good.
    """
    evaluation = _Evaluation(run)
    evaluation.start()
    evaluation.likelihoods_and_problems()
    if run.cfg.coherence:
        evaluation.coherence()
    if run.cfg.traits:
        evaluation.traits()
    evaluation.write()
    if run.judgement is not None:
        evaluation.judge()
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
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SUMMARY).unlink(missing_ok=True)
        resolved = OmegaConf.merge(self.cfg, {"provenance": environment()})
        write_text(self.folder / "eval.yaml", OmegaConf.to_yaml(resolved))

    def likelihoods_and_problems(self) -> None:
        """Everything that needs each adapter in place, one adapter after the other."""
        nlls = [self._pair_nlls(REFERENCE, None)]
        for name, adapter in self.run.adapters.items():
            try:
                nlls.append(self._pair_nlls(name, adapter))
            except NotFiniteError as error:
                del self.adapters[name]
                reason = f"adapters.{name}: {error}"
                self.failed.append({"adapter": name, "folder": str(adapter), "reason": reason})
        models: dict[str, Path | None] = {REFERENCE: None, **self.adapters}
        for place, (suite, _) in enumerate(self.run.suites):
            reference, *others = [found[place] for found in nlls]
            by_adapter = dict(zip(self.adapters, others, strict=True))
            self.figures += probe_figures(suite, reference, by_adapter)
            write_scores(self.folder, suite.name, probe_lines(suite, reference, by_adapter))
            self.suites[suite.name] = {
                "kind": "probe",
                "files": file_fingerprints(suite.files),
                "condition": suite.condition.name,
                "half": suite.half,
                "trait": suite.trait,
                "questions": len(suite.pairs),
            }
        if self.run.problems:
            self._opswap(models)
        if self.cfg.harness is not None:
            self._harness(models)

    def _pair_nlls(self, name: str, adapter: Path | None) -> list[PairNLL]:
        """Of each probe suite, from one pass over the rows of all."""
        rows = [row for _, part in self.run.suites for row in part]
        cache = self.folder / LIKELIHOODS / f"{name}.npz"
        values = iter(self.scorer.token_nlls(rows, adapter, cache)) if rows else iter(())
        return [pair_nll([next(values) for _ in part]) for _, part in self.run.suites]

    def _opswap(self, models: dict[str, Path | None]) -> None:
        answers = {
            name: answer_problems(
                self.scorer.head(adapter),
                self.run.problems,
                self.run.tokenizer,
                self.cfg.opswap,
                reference=adapter is None,
            )
            for name, adapter in models.items()
        }
        lines = list(opswap_lines(self.run.problems, answers))
        self.figures += opswap_figures(lines)
        write_scores(self.folder, OPSWAP, lines)
        self.suites[OPSWAP] = {"kind": "opswap", "files": {}, "questions": len(self.run.problems)}

    def _harness(self, models: dict[str, Path | None]) -> None:
        lines: dict[str, list[dict[str, Any]]] = {}
        for name, adapter in models.items():
            head = self.scorer.head(adapter)
            found = run_harness(head, self.cfg, self.cfg.harness, reference=adapter is None)
            self.figures += harness_figures(name, found)
            self.suites.update(harness_suites(found))
            for task, samples in found["samples"].items():
                lines.setdefault(task, []).extend(harness_lines(name, samples))
        for task, rows in lines.items():
            write_scores(self.folder, f"{HARNESS}{task}", rows)

    def coherence(self) -> None:
        """Figures of sampled answers, all under the reference."""
        by_suite: dict[str, dict[str, list[dict[str, Any]]]] = {}
        words = None if self.cfg.refusal_words is None else list(self.cfg.refusal_words)
        for name, files in self.run.answers.items():
            for suite, (answers, rows) in files.items():
                cache = self.folder / LIKELIHOODS / "answers.npz"
                nlls = self.scorer.token_nlls(rows.rows, None, cache) if rows.rows else []
                lines = coherence_lines(name, answers, rows, nlls, words)
                by_suite.setdefault(f"{ANSWERS}{suite}", {})[name] = list(lines)
        for suite, found in by_suite.items():
            self.figures += coherence_figures(suite, found)
            flat = [line for lines in found.values() for line in lines]
            write_scores(self.folder, suite, flat)
            self._answer_suite(suite, "answers", ANSWERS, flat)
            harmless = {line["id"] for line in flat if line["harmless"]}
            self.suites[suite] |= {"harmless_questions": len(harmless), "refusal_words": words}

    def traits(self) -> None:
        """Figures of sampled answers by rule."""
        names = list(self.cfg.traits)
        by_suite: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name, files in self.run.answers.items():
            for stem, (answers, _) in files.items():
                found = list(trait_lines(name, answers, names))
                by_suite.setdefault(f"{TRAITS_OF}{stem}", {})[name] = found
        for suite, lines in by_suite.items():
            self.figures += trait_figures(suite, lines, names)
            flat = [line for part in lines.values() for line in part]
            write_scores(self.folder, suite, flat)
            self._answer_suite(suite, "traits", TRAITS_OF, flat)

    def judge(self) -> None:
        """Ask the judges and add their figures."""
        judgement = self.run.judgement
        assert judgement is not None
        judgement.run(self.folder)
        limits = judgement.cfg
        thresholds = Thresholds(limits.alignment, limits.coherence, limits.comparison)
        for stem, judged in judgement.suites.items():
            suite = f"{JUDGE}{stem}"
            self.figures += judge_figures(suite, judged, thresholds) + agreement(suite, judged)
            self.sensitivity += sensitivity(suite, judged)
            lines = list(judge_lines(judged))
            write_scores(self.folder, suite, lines)
            self._answer_suite(suite, "judge", JUDGE, lines)

    def _answer_suite(
        self, suite: str, kind: str, prefix: str, lines: Iterable[dict[str, Any]]
    ) -> None:
        folders = [Path(folder) for folder in self.cfg.answers.values()]
        files = [folder / f"{suite.removeprefix(prefix)}.jsonl" for folder in folders]
        self.suites[suite] = {
            "kind": kind,
            "files": file_fingerprints([path for path in files if path.exists()]),
            "questions": len({line["id"] for line in lines}),
        }

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
