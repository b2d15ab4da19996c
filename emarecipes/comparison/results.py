"""What evaluations found, by arm: values by seed and question. Shapes: S seeds, Q questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from emarecipes.comparison.statistics import Floats
from emarecipes.comparison.traits import trait_shifts
from emarecipes.datasets.opswap import canonical
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE
from emarecipes.evaluation.settings import ANSWERS, TRAITS_OF

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Values:
    """One value a question and seed.

    Attributes:
        ids: Of the Q questions.
        categories: Of each.
        values_SQ: Row s of seed s.
        clusters: What each belongs to, where several say nearly the same; empty: each alone.
        is_share: Whether they are differences of shares of answers.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    values_SQ: Floats
    clusters: tuple[str, ...] = ()
    is_share: bool = False

    def of_seeds(self, rows: Sequence[int]) -> Values:
        """Those of some rows, in that order."""
        return replace(self, values_SQ=self.values_SQ[list(rows)])


@dataclass(frozen=True)
class Scores:
    """The scores of an arm's runs on one task.

    Attributes:
        seeds: Of the rows.
        probes: Probe shifts by suite.
        correct: Of OpSwap: 1 where a problem was answered right; None if not evaluated.
        reference_correct: The reference's share of right answers to it.
        coherent: 1 where a sampled answer hangs together; None if answers were not scored for it.
        reference_coherent: The share of the base's own answers that do, if it was asked.
        figures: Of each seed, the whole-suite figures of `summary.json`, by (suite, figure, judge).
        suites: `summary.json`'s description of each suite.
        base: Fingerprint of the reference.
        date: The day in the prompts, where the chat template prints one.
        adapters: Fingerprint of each seed's adapter; empty where it is not known.
        sensitivity: The thresholds under which misaligned rates were also taken.
        answers: Of the first seed: id to question and answer, if answers were scored.
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

    def asks_what(self, other: Scores, suite: str) -> bool:
        """Whether a probe is the other's: the same questions of the same files, asked alike."""
        if suite not in self.probes or self.probes[suite].ids != other.probes[suite].ids:
            return False
        mine, others = self.suites[suite], other.suites[suite]
        contents = [sorted(map(str, (s.get("files") or {}).values())) for s in (mine, others)]
        alike = all(mine.get(key) == others.get(key) for key in ("condition", "trait"))
        return alike and contents[0] == contents[1]


def read_scores(folder: Path, adapters: Mapping[str, int]) -> Scores:
    """Read an evaluation of several seeds of an arm, without those whose likelihoods failed.

    Args:
        folder: With `summary.json` and `scores/`.
        adapters: The seed of each adapter's name in it.

    Raises:
        UserError: A file that is missing, broken, truncated or not of these adapters; a score that
            is not finite.
    """
    summary = _read_json(folder / SUMMARY)
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
    correct = reference_correct = None
    answered: list[dict[str, Any]] = []
    for suite, description in list(scores.suites.items()):
        path = folder / "scores" / f"{suite}.jsonl"
        kind = description.get("kind")
        try:
            if kind == "probe":
                scores.probes[suite] = _shifts(path, list(adapters))
            elif kind == "opswap":
                correct = _correct(path, list(adapters))
                known = _figures(summary["figures"], REFERENCE).get((suite, "exact_match", ""), {})
                reference_correct = known.get("value")
            elif kind == "traits":
                lines = _read_lines(path)
                for key, of in trait_shifts(suite, lines, list(adapters)).items():
                    scores.probes[key] = Values(of.ids, of.categories, of.shifts_SQ, is_share=True)
                    scores.suites[key] = {"kind": "trait", "files": {"questions": of.asked}}
                asked = suite.replace(TRAITS_OF, ANSWERS, 1)
                lines = [row | {"id": f"{asked}/{row['id']}"} for row in lines]
                scores.answers.update(_answers(lines, next(iter(adapters))))
            elif kind == "answers":
                lines = [row | {"id": f"{suite}/{row['id']}"} for row in _read_lines(path)]
                scores.answers.update(_answers(lines, next(iter(adapters))))
                answered += lines
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a line lacks {error}") from None
    return replace(
        scores,
        correct=correct,
        reference_correct=reference_correct,
        coherent=_coherent(answered, list(adapters)),
        reference_coherent=_base_coherent(answered),
    )


def find_adapter(run: Path) -> str:
    """The name, in a run folder's own evaluation, of the adapter that this run trained.

    Raises:
        UserError: No evaluation, or none of this adapter.
    """
    summary = _read_json(run / SUMMARY)
    adapters = summary.get("adapters")
    if isinstance(adapters, dict):
        if len(adapters) == 1:
            return str(next(iter(adapters)))
        for name, entry in adapters.items():
            if Path(entry.get("folder", "")).resolve() == (run / "adapter").resolve():
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
    return {
        (figure["suite"], figure["figure"], figure.get("judge") or ""): figure
        for figure in figures
        if figure["adapter"] == adapter and figure["category"] is None
    }


def _shifts(path: Path, adapters: list[str]) -> Values:
    rows = _read_lines(path)
    values = [[row["adapters"][name]["probe_shift"] for row in rows] for name in adapters]
    return _values(path, rows, values)


def _correct(path: Path, adapters: list[str]) -> Values:
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _read_lines(path):
        rows.setdefault(row["adapter"], {})[row["id"]] = row
    first = list(rows[adapters[0]].values())
    values = [[float(rows[name][row["id"]]["correct"]) for row in first] for name in adapters]
    clusters = tuple(canonical(row["question"]) for row in first)
    return replace(_values(path, first, values), clusters=clusters)


def _coherent(lines: Sequence[dict[str, Any]], adapters: list[str]) -> Values | None:
    """By answer, a question's together; None if an adapter lacks one, or lines are from before."""
    rows = {(row["adapter"], _answer_id(row)): row for row in lines}
    first = [row for row in lines if row["adapter"] == adapters[0]]
    places = [[(name, _answer_id(row)) for row in first] for name in adapters]
    if not first or any(rows.get(p, {}).get("coherent") is None for of in places for p in of):
        return None
    return Values(
        tuple(_answer_id(row) for row in first),
        tuple(str(row.get("category") or "") for row in first),
        np.array([[float(rows[place]["coherent"]) for place in of] for of in places]),
        clusters=tuple(str(row["id"]) for row in first),
    )


def _answer_id(row: Mapping[str, Any]) -> str:
    return f"{row['id']}/{row.get('paraphrase', 0)}/{row.get('sample', 0)}"


def _base_coherent(lines: Sequence[dict[str, Any]]) -> float | None:
    found = [row.get("coherent") for row in lines if row["adapter"] == REFERENCE]
    return None if not found or None in found else float(np.mean(np.array(found, dtype=float)))


def _answers(lines: Sequence[dict[str, Any]], adapter: str) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for row in lines:
        if row["adapter"] == adapter:
            found.setdefault(row["id"], (row["question"], row["answer"]))
    return found


def _values(path: Path, rows: list[dict[str, Any]], values: list[list[Any]]) -> Values:
    array = np.array(values, dtype=np.float64)
    if array.size == 0:
        raise UserError(f"{path}: the suite has no questions")
    if not np.isfinite(array).all():
        question = int(np.argwhere(~np.isfinite(array))[0][1])
        raise UserError(f"{path}: {rows[question]['id']}: a score is not finite")
    return Values(
        tuple(str(row["id"]) for row in rows),
        tuple(str(row.get("category") or "") for row in rows),
        array,
    )


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
