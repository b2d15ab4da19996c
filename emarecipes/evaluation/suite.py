"""What an evaluation is made of: a suite asks every model the same, and gives figures of it."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from emarecipes.errors import UserError, first_line
from emarecipes.evaluation.figures import Figure, Item, make_figures, plain
from emarecipes.evaluation.suite_context import SuiteContext

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from emarecipes.config import Origin
    from emarecipes.evaluation.suite_context import Model
    from emarecipes.probes.contrast import AnswerRow

Line = Mapping[str, Any]


class NoValues(UserError):
    """The lines of a suite have no values of a figure."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(f"{figure.suite}: its lines have no values of {figure.figure}")


class Scored(NamedTuple):
    """What a suite found.

    Attributes:
        figures: For `summary.json`, in the order in which they are shown.
        lines: For `scores/<suite>.jsonl`: what the figures are made of, see `Suite.items`.
        description: The suite's entry in `summary.json`. What is lacking of `kind`, `files` (none)
            and `questions` (different ids of lines) is added.
        part: Of a suite that reports under several names: what stands behind its own and `_`.
        sensitivity: Figures under other thresholds, which `summary.json` keeps apart.
    """

    figures: Sequence[Figure]
    lines: Sequence[Line]
    description: Mapping[str, Any] = {}
    part: str | None = None
    sensitivity: Sequence[Figure] = ()


class Suite(ABC):
    """Base class of suites; docs/own_suite.md shows one of your own.

    The arguments of `__init__` are the keys of its entry in the config.

    Attributes:
        kind: Its word in `summary.json`; empty: the class's address, by which `ema_compare` finds
            it again.
        meaning: What a change of its figures says, for a comparison's page.
        needs_answers: Whether it is of the sampled answers that `answers` names.
        may_fail: Whether it may fail for reasons of its own, such as a service's; what was found
            before it is written first.
        name: Of its figures and files; the recipe sets it.
        key: Its place in the config; the recipe sets it.
        rows: Set by `check`: conversations whose likelihoods it needs under every model. They are
            computed for all suites at once, and an adapter under which one is not finite is left
            out of all.
    """

    kind: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    needs_answers: ClassVar[bool] = False
    may_fail: ClassVar[bool] = True
    name: str = ""
    key: str = ""
    rows: Sequence[AnswerRow] = ()

    def check(self, context: SuiteContext) -> None:  # noqa: B027
        """Read what it asks, and refuse what cannot work, before any weight is loaded.

        Raises:
            ValueError: With what is wrong; the entry's place is put before it.
        """

    @abstractmethod
    def score(self, models: Mapping[str, Model]) -> Scored | Iterable[Scored]:
        """Ask the models.

        Args:
            models: The base alone as `reference`, then each adapter, by name.

        Returns:
            What was found; of a suite that reports under several names, a piece or more for each.
        """

    @classmethod
    def items(cls, lines: Iterable[Line], figure: Figure) -> list[Item]:
        """The values of one adapter that a figure is the mean of, from the suite's lines.

        A comparison reads them, so that any figure can be a criterion (docs/compare.md#criteria).
        As it stands here for lines of one adapter and answer each, with `adapter`, `id` (of the
        question) and, where there are such, `category`, `paraphrase`, `sample`. The value stands
        under the figure's name, or under that without `_share`: a number, true or false; null
        where there is none. Override it for other lines.

        Args:
            lines: Of `scores/<suite>.jsonl`.
            figure: Which one, and whose; its own value is not read.

        Returns:
            One a line of that adapter; none if the figure has no values of it.

        Raises:
            NoValues: Lines have none of this figure.
        """
        column = figure.figure
        items = []
        for line in lines:
            if line["adapter"] != figure.adapter:
                continue
            if column not in line:
                column = figure.figure.removesuffix("_share")
            if column not in line:
                raise NoValues(figure)
            items.append(item_of(line, line[column]))
        return items

    def figures(
        self, lines: Iterable[Line], units: Mapping[str, str], part: str | None = None
    ) -> list[Figure]:
        """Means of `items` with their 95 % intervals, by adapter and category.

        Args:
            lines: Of one adapter and answer each, see `items`.
            units: By figure; `share` for values that are 0 or 1, see `make_figures`.
            part: See `Scored`.
        """
        kept, name = list(lines), self.named_part(part)
        found: list[Figure] = []
        for adapter in dict.fromkeys(str(line["adapter"]) for line in kept):
            for figure, unit in units.items():
                items = self.items(kept, asked(adapter, name, figure))
                found += make_figures(items, adapter, name, figure, unit)
        return found

    def named_part(self, part: str | None) -> str:
        """What it reports under."""
        return self.name if part is None else f"{self.name}_{part}"

    def units(self) -> Mapping[str, str] | None:
        """Units of its figures, where these are known before any is computed.

        A comparison then refuses other figures before anything is trained.
        """
        return None

    def is_named(self, name: str) -> bool:
        """Whether it may report under this name: its own, or its own with a part."""
        return name == self.name or name.startswith(f"{self.name}_")


class KeyedSuite(Suite):
    """A suite of this package, which has a key of its own at a config's top level."""

    @classmethod
    @abstractmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """The suites that its key names; their entries in the config get their defaults.

        Raises:
            UserError: With the place of what is wrong in them.
        """


def item_of(line: Line, value: float | bool | None, cluster: str = "") -> Item:
    """The item of one line; null is NaN.

    Args:
        line: With `id`, and maybe `category`, `paraphrase`, `sample`.
        value: Its value.
        cluster: What is resampled as one; empty: the question, by `id`.
    """
    question = str(line["id"])
    answer = f"{question}/{line.get('paraphrase', 0)}/{line.get('sample', 0)}"
    number = math.nan if value is None else float(value)
    return Item(number, cluster or question, str(line.get("category") or ""), answer)


def asked(adapter: str, suite: str, figure: str, **known: Any) -> Figure:
    """A figure that is yet to be found, for `Suite.items`."""
    return Figure(adapter, suite, figure, None, None, None, None, 0, 0, "", **known)


def kind_of(suite: Suite) -> str:
    """What `summary.json` calls it: its own word, or the class's address."""
    return suite.kind or f"{type(suite).__module__}.{type(suite).__qualname__}"


def pieces(suite: Suite, found: Any, known: Collection[str]) -> list[tuple[str, Scored]]:
    """What a suite's `score` gave, by the name that it is reported under.

    Args:
        suite: The suite.
        found: What it gave.
        known: Names that a figure may be of: of models and of sampled answers.

    Raises:
        UserError: Nothing; or, of a suite that is not ours, what no summary should hold: a figure
            of another suite or model, or without its unit, number or interval; a line without id.
    """
    where = f"{suite.key}: {type(suite).__name__}.score"
    several = found if isinstance(found, Iterable) else ()
    parts = [found] if isinstance(found, Scored) else list(several)
    if not parts or not all(isinstance(part, Scored) for part in parts):
        said = "nothing" if found is None or several is found else type(found).__name__
        raise UserError(f"{where} gave {said}; it gives Scored(figures, lines, description)")
    if not any(part.figures for part in parts):
        raise UserError(f"{where} gave no figure")
    named = []
    seen: set[tuple[Any, ...]] = set()
    for part in parts:
        name = suite.named_part(part.part)
        named.append((name, part))
        if suite.kind:
            continue
        if part.part is not None and not re.fullmatch(r"[\w.-]+", str(part.part)):
            raise UserError(f"{where}: a part's name is letters, digits, _, . and -")
        for figure in part.figures:
            if reason := _wrong(figure, name, known):
                raise UserError(f"{where}: {reason}")
            which = (name, figure.adapter, figure.figure, figure.category, figure.judge)
            if which in seen:
                raise UserError(f"{where}: the figure {figure.figure} is there twice, see {which}")
            seen.add(which)
        for line in part.lines:
            if not isinstance(line, Mapping) or "id" not in line:
                raise UserError(f"{where}: a line needs an id, of its question")
            try:
                json.dumps(plain(line))
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: the line of {line['id']}: {first_line(error)}") from None
    return named


def _wrong(figure: Any, suite: str, known: Collection[str]) -> str:
    """What is wrong with a figure; empty if nothing is."""
    if not isinstance(figure, Figure):
        return f"{type(figure).__name__} is no Figure; make_figures makes them"
    what = f"the figure {figure.figure}"
    if figure.suite != suite:
        return f"{what} is of the suite {figure.suite}, not of {suite}"
    if figure.adapter is not None and figure.adapter not in known:
        return f"{what} is of {figure.adapter}, which is no model here"
    if not figure.unit:
        return f"{what} has no unit, such as share or nats a token"
    numbers = (figure.value, figure.low, figure.high)
    if not all(isinstance(number, float | int | None) for number in numbers):
        return f"{what} is {figure.value!r:.60}, from {figure.low!r:.60}: a float is needed"
    if figure.value is not None and not math.isfinite(figure.value):
        return f"{what} is {figure.value}; what has no value is None"
    if figure.unit == "share" and not all(0 <= x <= 1 for x in numbers if x is not None):
        return f"{what} is {figure.value:g} [{figure.low}, {figure.high}]; a share is from 0 to 1"
    if not all(isinstance(count, int) for count in (figure.n, figure.questions)):
        return f"{what} is of {figure.n!r} values and {figure.questions!r} questions: no numbers"
    if figure.value is not None and (figure.n < 1 or figure.questions < 1):
        return f"{what} does not say of how many values and questions it is"
    if figure.value is not None and figure.questions > 1 and None in (figure.low, figure.high):
        return f"{what} has no interval; make_figures gives one"
    low, high = figure.low, figure.high
    if low is not None and high is not None and not low <= high:
        return f"{what} has an interval from {low} to {high}"
    return ""
