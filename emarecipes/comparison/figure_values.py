"""Values by question of any suite's figure, from the lines that an evaluation keeps of it.

A suite's class says what of its lines a figure is the mean of, see `Suite.items`.
Shapes: S seeds, Q questions or answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emarecipes.comparison.statistics import Floats
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE, Figure, Item
from emarecipes.evaluation.settings import suite_class
from emarecipes.evaluation.suite import Line, NoValues, Suite

# Units as the page has them.
_SHOWN = {"nats a token": "nats", "share": "share of answers"}


@dataclass(frozen=True)
class Values:
    """One value a question and seed.

    Attributes:
        ids: Of the Q questions.
        categories: Of each.
        values_SQ: Row s of seed s.
        clusters: What each belongs to, where several say nearly the same; empty: each alone.
        unit: The figure's, in words.
        meaning: What a change of it says, in words; empty where that is for the user to say.
        sampled: Whether it is of sampled answers.
        halves: Whether its questions may have a half for choices and one for the report.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    values_SQ: Floats
    clusters: tuple[str, ...] = ()
    unit: str = "nats"
    meaning: str = ""
    sampled: bool = False
    halves: bool = True

    @property
    def is_share(self) -> bool:
        """Whether they are differences of shares of answers, so within -+1."""
        return self.unit == _SHOWN["share"]

    def of_seeds(self, rows: Sequence[int]) -> Values:
        """Those of some rows, in that order."""
        return replace(self, values_SQ=self.values_SQ[list(rows)])


@dataclass(frozen=True)
class Source:
    """A figure, and the lines that it is made of.

    Attributes:
        figure: One adapter's, as `summary.json` has it.
        description: The suite's there.
        lines: Of `scores/<suite>.jsonl`.
        path: That file.
    """

    figure: Figure
    description: Mapping[str, Any]
    lines: Sequence[Line]
    path: Path

    @property
    def kind(self) -> type[Suite]:
        """The suite's class."""
        return suite_class(str(self.description.get("kind")))

    def items(self, adapter: str) -> list[Item]:
        """What that adapter's figure is the mean of.

        Raises:
            UserError: A line is not as the suite writes it.
        """
        try:
            return self.kind.items(self.lines, replace(self.figure, adapter=adapter))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: a line lacks {error}") from None

    def shifts(self, adapters: Sequence[str]) -> Values:
        """A question's mean minus the base's own; the value itself where that is a change already.

        NaN where an adapter or the base has none.

        Args:
            adapters: S names, in the order of the seeds.

        Raises:
            UserError: Adapters that answer other questions, or no answers of the base; a change
                that is not finite.
        """
        base, found = _means(self.items(REFERENCE)), [_means(self.items(a)) for a in adapters]
        if self.kind.needs_answers and not base:
            raise UserError(
                f"{self.path}: {self.figure.figure} is to be a change from the base's answers, and "
                "there are none; sample them, and name them as answers.reference"
            )
        # Answers come in the order in which each adapter's were sampled.
        ids = sorted(base) if base else list(found[0])
        if not ids:
            raise UserError(f"{self.path}: the suite has no questions")
        for adapter, of in zip(adapters, found, strict=True):
            if of.keys() != set(ids):
                raise UserError(f"{self.path}: {adapter} answers other questions than the base")
        own_SQ = np.array([[of[name].value for name in ids] for of in found])
        if base:
            own_SQ = own_SQ - np.array([base[name].value for name in ids])
        elif not np.isfinite(own_SQ).all():
            question = int(np.argwhere(~np.isfinite(own_SQ))[0][1])
            raise UserError(f"{self.path}: {ids[question]}: a score is not finite")
        return Values(
            tuple(ids),
            tuple((base or found[0])[name].category for name in ids),
            own_SQ,
            unit=_SHOWN.get(self.figure.unit, self.figure.unit),
            meaning=self.kind.meaning,
            sampled=self.kind.needs_answers,
            halves=bool(self.description.get("files")) and not self.kind.needs_answers,
        )

    def asked(self) -> str:
        """Digest of the questions and what surrounds them, by which two suites are compared."""
        known = self.description
        contents: Any = sorted(map(str, (known.get("files") or {}).values()))
        if self.kind.needs_answers:  # Its files are answers.
            contents = sorted({(str(line["id"]), str(line.get("question"))) for line in self.lines})
        text = json.dumps([contents, known.get("condition"), known.get("trait")])
        return hashlib.sha256(text.encode()).hexdigest()


def by_answer(sources: Sequence[Source], adapters: Sequence[str]) -> Values | None:
    """Every answer's own value, of several suites together.

    Args:
        sources: One a suite.
        adapters: S names, in the order of the seeds.

    Returns:
        None without suites, where an adapter lacks an answer of another, or where lines have no
        such value.
    """
    try:
        found = [_by_id(sources, adapter) for adapter in adapters]
    except NoValues:
        return None
    first = found[0]
    if not first or any(of.keys() != first.keys() for of in found):
        return None
    values_SQ = np.array([[of[name].value for name in first] for of in found])
    if not np.isfinite(values_SQ).all():
        return None
    items = first.values()
    clusters = tuple(str(item.question) for item in items)
    return Values(tuple(first), tuple(item.category for item in items), values_SQ, clusters)


def mean_of(sources: Sequence[Source], adapter: str) -> float | None:
    """The mean over all answers; None if there are none, or lines have no such value."""
    try:
        values = [item.value for item in _by_id(sources, adapter).values()]
    except NoValues:
        return None
    return float(np.mean(values)) if values and np.isfinite(values).all() else None


def _by_id(sources: Sequence[Source], adapter: str) -> dict[str, Item]:
    """Of answers to questions of one name in several suites, each is its own."""
    return {
        f"{source.figure.suite}/{item.id}": replace(
            item, question=f"{source.figure.suite}/{item.question}"
        )
        for source in sources
        for item in source.items(adapter)
    }


def _means(items: Iterable[Item]) -> dict[str, Item]:
    """By question: the mean of its items that have a value; NaN if none has."""
    grouped: dict[str, list[Item]] = {}
    for item in items:
        grouped.setdefault(str(item.question), []).append(item)
    means = {}
    for name, of in grouped.items():
        told = [item.value for item in of if np.isfinite(item.value)]
        means[name] = replace(of[0], value=sum(told) / len(told) if told else float("nan"))
    return means
