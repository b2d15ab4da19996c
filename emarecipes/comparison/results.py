"""What evaluations found, by arm: values by seed and question. Shapes: S seeds, Q questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from emarecipes.comparison.criterion import SHARE, CriteriaSettings, CriterionSettings
from emarecipes.comparison.figure_values import Source, Values, by_answer, mean_of
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE, SUMMARY, Figure
from emarecipes.evaluation.settings import BY_KIND
from emarecipes.evaluation.suite import asked
from emarecipes.fingerprint import adapter_content


@dataclass(frozen=True)
class Scores:
    """The scores of an arm's runs on one task.

    Attributes:
        seeds: Of the rows.
        probes: Shifts of the criteria's figures, by `CriterionSettings.key`.
        correct: Of the benign task: 1 where a problem was answered right; None if not evaluated.
        reference_correct: The reference's share of right answers to it.
        coherent: 1 where a sampled answer hangs together; None if answers were not scored for it.
        reference_coherent: The share of the base's own answers that do, if it was asked.
        figures: Of each seed, the whole-suite figures of `summary.json`, by (suite, figure, judge).
        suites: `summary.json`'s description of each suite.
        base: Fingerprint of the reference.
        date: The day in the prompts, where the chat template prints one.
        adapters: Fingerprint of each seed's adapter; empty where it is not known.
        sensitivity: The thresholds under which misaligned rates were also taken.
        asked: Of each of `probes` a digest of what is asked, see `Source.asked`.
        answers: Of the first seed: id to question and answer, if answers were scored.
        paired: Whether `probes` are bad answers' runs minus good answers', see `paired`.
    """

    seeds: tuple[int, ...]
    probes: dict[str, Values] = field(default_factory=dict)
    correct: Values | None = None
    reference_correct: float | None = None
    coherent: Values | None = None
    reference_coherent: float | None = None
    figures: list[dict[tuple[str, str, str], dict[str, Any]]] = field(default_factory=list)
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str = ""
    date: str | None = None
    adapters: tuple[str, ...] = ()
    sensitivity: tuple[str, ...] = ()
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    paired: bool = False

    def asks_what(self, other: Scores, suite: str) -> bool:
        """Whether a probe is the other's: the same questions of the same files, asked alike."""
        if suite not in self.probes or self.probes[suite].ids != other.probes[suite].ids:
            return False
        return self.asked.get(suite) == other.asked.get(suite)


def read_scores(
    folder: Path, adapters: Mapping[str, int], criteria: CriteriaSettings | None = None
) -> Scores:
    """Read an evaluation of several seeds of an arm, without those whose likelihoods failed.

    Args:
        folder: With `summary.json` and `scores/`.
        adapters: The seed of each adapter's name in it.
        criteria: Which figures are read by question.

    Raises:
        UserError: A file that is missing, broken, truncated or not of these adapters; a score that
            is not finite.
    """
    summary, criteria = _read_json(folder / SUMMARY), criteria or CriteriaSettings()
    try:
        failed = {entry["adapter"] for entry in summary.get("failed", ())}
        adapters = {name: seed for name, seed in adapters.items() if name not in failed}
        if not adapters:
            raise UserError(f"{folder / SUMMARY}: every adapter failed")
        for name in adapters:
            if name not in summary["adapters"]:
                raise UserError(f"{folder / SUMMARY}: has no adapter {name}")
        scores = Scores(
            seeds=tuple(adapters.values()),
            figures=[_figures(summary["figures"], name) for name in adapters],
            suites=summary["suites"],
            base=summary["base"]["fingerprint"],
            date=summary.get("date"),
            adapters=tuple(summary["adapters"][name].get("fingerprint", "") for name in adapters),
            sensitivity=tuple(
                dict.fromkeys(str(f["thresholds"]) for f in summary.get("sensitivity", ()))
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / SUMMARY}: not an evaluation's summary ({error!r})") from None
    return _with_values(scores, folder, summary["figures"], list(adapters), criteria)


def _with_values(
    scores: Scores,
    folder: Path,
    figures: Sequence[Mapping[str, Any]],
    adapters: list[str],
    criteria: CriteriaSettings,
) -> Scores:
    """The scores with the values by question and by answer of the figures behind criteria."""
    lines: dict[str, list[dict[str, Any]]] = {}
    suites = dict(scores.suites)  # Without the figures' own entries, which come to them.

    def source(suite: str, criterion: CriterionSettings) -> Source:
        path = folder / "scores" / f"{suite}.jsonl"
        if suite not in lines:
            lines[suite] = _read_lines(path)
        figure = _figure(figures, suite, criterion, adapters[0])
        return Source(figure, suites[suite], lines[suite], path)

    def sources(criterion: CriterionSettings) -> list[Source]:
        return [source(suite, criterion) for suite in criterion.among(suites)]

    for criterion in _shifted(criteria, suites):
        # Of several suites none is meant: `measure` says that there is no such one.
        if criterion.suite in suites:
            of = source(criterion.suite, criterion)
            scores.probes[criterion.key] = of.shifts(adapters)
            scores.asked[criterion.key] = of.asked()
            scores.suites.setdefault(criterion.key, suites[criterion.suite])
    benign, coherent = sources(criteria.benign), sources(criteria.coherent)
    for of in (*benign, *coherent):
        if of.figure.unit not in ("", SHARE):  # Of a suite that does not say it before.
            raise UserError(f"{of.path}: {of.figure.figure} is in {of.figure.unit}, and no share")
    return replace(
        scores,
        correct=by_answer(benign, adapters),
        reference_correct=mean_of(benign, REFERENCE),
        coherent=by_answer(coherent, adapters),
        reference_coherent=mean_of(coherent, REFERENCE),
        answers=_answers(folder, suites, adapters[0]),
    )


def _shifted(
    criteria: CriteriaSettings, suites: Mapping[str, Mapping[str, Any]]
) -> Iterator[CriterionSettings]:
    """The criteria that are shifts, and general's figure under other conditions."""
    yield from criteria.shifted.values()
    general, named = criteria.general, {found.suite for found in criteria.shifted.values()}
    kind = suites.get(general.suite, {}).get("kind")
    for name, known in list(suites.items()):
        if name in named or known.get("kind") != kind:
            continue
        if known.get("condition", "none") != "none":
            yield general.model_copy(update={"suite": name})


def _figure(
    figures: Sequence[Mapping[str, Any]], suite: str, criterion: CriterionSettings, adapter: str
) -> Figure:
    """The figure of a suite as `summary.json` has it; without a value if it has none."""
    known = {field.name for field in fields(Figure)}
    for found in figures:
        of = (found["suite"], found["figure"], found["adapter"], found["category"])
        judged = criterion.judge in (None, found.get("judge"))
        if judged and of == (suite, criterion.figure, adapter, None):
            figure = Figure(**{key: value for key, value in found.items() if key in known})
            return figure if criterion.judge else replace(figure, judge=None)
    return asked(adapter, suite, criterion.figure, judge=criterion.judge)


def find_adapter(run: Path) -> str:
    """The name, in a run folder's own evaluation, of the adapter that this run trained.

    By its folder, or by its content, as the run may have been moved since. An only one is taken at
    its word where there is no `adapter/` to compare it with.

    Raises:
        UserError: No evaluation, or none of this adapter.
    """
    summary = _read_json(run / SUMMARY)
    adapters = summary.get("adapters")
    if isinstance(adapters, dict):
        for name, entry in adapters.items():
            if Path(entry.get("folder", "")).resolve() == (run / "adapter").resolve():
                return str(name)
        contents = {adapter_content(path) for path in run.glob("adapter*") if path.is_dir()}
        for name, entry in adapters.items():
            if entry.get("fingerprint") in contents:
                return str(name)
        for name, entry in adapters.items() if len(adapters) == 1 else ():
            within = Path(entry.get("folder", "")).resolve().parent == run.resolve()
            if within or "fingerprint" not in entry or not (run / "adapter").is_dir():
                return str(name)
    raise UserError(f"{run / SUMMARY}: has no adapter of this run")


def stack(parts: Sequence[Scores]) -> Scores:
    """The scores of several evaluations of the same questions, one a seed, as one.

    Raises:
        UserError: They are of different questions, suites or references.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.base != first.base:
            raise UserError("runs of one arm were evaluated against different references")
        if part.date != first.date:
            raise UserError("runs of one arm were evaluated on prompts of different days")
        if set(part.probes) != set(first.probes) or not all(
            part.asks_what(first, suite) for suite in first.probes
        ):
            raise UserError("runs of one arm were evaluated on different questions")
    return replace(
        first,
        seeds=tuple(seed for part in parts for seed in part.seeds),
        adapters=tuple(found for part in parts for found in part.adapters),
        probes={suite: _joined([part.probes[suite] for part in parts]) for suite in first.probes},
        correct=_joined([part.correct for part in parts]),
        coherent=_joined([part.coherent for part in parts]),
        figures=[figures for part in parts for figures in part.figures],
    )


@overload
def _joined(parts: Sequence[Values]) -> Values: ...
@overload
def _joined(parts: Sequence[Values | None]) -> Values | None: ...
def _joined(parts: Sequence[Values | None]) -> Values | None:
    """The rows of all, if all have the same questions."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or any(part.ids != found[0].ids for part in found):
        return None
    return replace(found[0], values_SQ=np.concatenate([part.values_SQ for part in found]))


def read_metrics(run: Path) -> list[dict[str, float]]:
    """A run's `metrics.jsonl` up to its first broken line; empty if there is none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found: list[dict[str, float]] = []
    with suppress(ValueError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found.append(json.loads(line))
    return found


def _figures(figures: list[dict[str, Any]], adapter: str) -> dict[Any, dict[str, Any]]:
    """Those of whole suites. Every figure is read, so that one that lacks a key is told here."""
    found = {}
    for figure in figures:
        key = (figure["suite"], figure["figure"], figure.get("judge") or "")
        if (figure["adapter"], figure["category"]) == (adapter, None):
            found[key] = figure
    return found


def _answers(
    folder: Path, suites: Mapping[str, Mapping[str, Any]], adapter: str
) -> dict[str, tuple[str, str]]:
    """Question and answer by id, of all suites over sampled answers."""
    found: dict[str, tuple[str, str]] = {}
    for suite, known in suites.items():
        if str(known.get("kind")) not in BY_KIND or not BY_KIND[known["kind"]].needs_answers:
            continue
        path = folder / "scores" / f"{suite}.jsonl"
        try:
            for row in _read_lines(path):
                if row["adapter"] == adapter:
                    # Several suites are of one file's answers.
                    key = f"{suite.partition('_')[2]}/{row['id']}"
                    found.setdefault(key, (row["question"], row["answer"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a line lacks {error}") from None
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: broken: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: broken: not a mapping")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: broken or truncated: {error}") from None
    return found
