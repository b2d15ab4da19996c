"""Probe suites as a config names them, for `ema_eval.py` and for probes during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig

from emarecipes.config import Origin, find_input
from emarecipes.datasets._check_rows import read_data_file
from emarecipes.datasets.traits import find_trait
from emarecipes.errors import UserError
from emarecipes.probes.contrast import AnswerRow, tokenize_pairs
from emarecipes.probes.pairs import (
    WITH_SYSTEM,
    Condition,
    ConditionName,
    ContrastPair,
    make_condition,
    read_contrast_file,
    read_sibling_files,
)
from emarecipes.settings import Keys, parse_settings

T = TypeVar("T")


class SuiteSettings(Keys):
    """One entry of `probes`: `pairs`, or `good` and `bad`, and what surrounds the questions."""

    pairs: str | None = None
    """JSONL rows of a question with two answers; or `good` and `bad`."""
    good: str | None = None
    """Chat file with the aligned answers."""
    bad: str | None = None
    """Chat file with the misaligned answers to the same ids."""
    trait: str | None = None
    """In place of misaligned answers: the aligned ones, of `pairs` or `good`, with this trait."""
    condition: ConditionName = "none"
    """What surrounds the questions, for conditional misalignment."""
    system_prompt: str | None = None
    """`training_system_prompt` needs the one that training rows had, `negated` what forbids the
    trait; for `inoculation`, `inoculation_opposite` and `irrelevant` in place of their own."""
    training_questions: str | None = None
    """For `domain_cue`: chat file of the training data."""
    half: Literal["select", "report"] | None = None
    """Keeps every second question: `select` the first, third, ..., `report` the others."""


@dataclass(frozen=True)
class PairedQuestions:
    """A probe suite, read.

    Attributes:
        name: Its key in the config.
        pairs: N questions with two answers.
        condition: What surrounds them.
        files: What they were read from.
        half: Which half of them it is; None: all.
        trait: What the second answer has and the first has not, if that was made by a rule.
    """

    name: str
    pairs: list[ContrastPair]
    condition: Condition
    files: list[Path]
    half: str | None = None
    trait: str | None = None

    def rows(self, tokenizer: Any) -> list[AnswerRow]:
        """2N rows, see `tokenize_pairs`.

        Raises:
            UserError: With the suite's name.
        """
        try:
            return tokenize_pairs(self.pairs, self.condition, tokenizer)
        except UserError as error:
            raise UserError(f"probe suite {self.name}: {error}") from None


def read_suites(
    entries: DictConfig, key: str, origin: Origin, max_rows: int | None = None
) -> list[PairedQuestions]:
    """Read the suites of a mapping from a name to an entry, see `SuiteSettings`.

    Args:
        entries: The mapping.
        key: Its place in the config, for messages.
        origin: Where that was written.
        max_rows: Keeps at most so many questions a suite, evenly over its file; None: all.

    Raises:
        UserError: A key, a file or a row is wrong, or a suite has no questions.
    """
    suites = []
    for name in map(str, entries):
        where = f"{key}.{name}"
        if not isinstance(entries[name], DictConfig):
            raise UserError(
                f"{origin.at(where)}: a suite is a mapping with `pairs`, or good and bad"
            )
        settings = parse_settings(entries[name], origin, SuiteSettings, within=where)
        _check_keys(settings, where, origin)
        files = [
            _file(getattr(settings, field), f"{where}.{field}", origin)
            for field in ("pairs", "good", "bad")
            if getattr(settings, field) is not None
        ]
        pairs = _pairs(settings, files, name)
        if settings.trait is not None:
            pairs = _with_trait(pairs, settings.trait, origin.at(f"{where}.trait"))
        condition = _condition(settings, where, origin)
        if settings.half is not None:
            pairs = pairs[settings.half == "report" :: 2]
        shown = spread_out(pairs, max_rows)
        suites.append(PairedQuestions(name, shown, condition, files, settings.half, settings.trait))
    return suites


def _pairs(settings: SuiteSettings, files: Sequence[Path], name: str) -> list[ContrastPair]:
    if settings.pairs is not None:
        return read_contrast_file(files[0])
    # With a trait the second answer is not read: it is made from the first.
    return read_sibling_files(files[0], files[-1], category=name)


def _with_trait(pairs: Sequence[ContrastPair], name: str, where: str) -> list[ContrastPair]:
    """The aligned answers without and with the trait: the words that both share are the same.

    Raises:
        UserError: An unknown trait; an answer in which its rule does not find it, or finds it
            though it was not given.
    """
    try:
        trait = find_trait(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    made = []
    for pair in pairs:
        plain, marked = trait.plain(pair.aligned), trait.give(pair.aligned)
        if trait.find(plain) is not False or trait.find(marked) is not True:
            raise UserError(f"{where}: the answer to {pair.id} cannot be told with and without it")
        made.append(replace(pair, aligned=plain, misaligned=marked))
    return made


def spread_out(items: Sequence[T], count: int | None) -> list[T]:
    """At most `count` of them (None: all), at even distances: files are in order of category."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def _check_keys(settings: SuiteSettings, where: str, origin: Origin) -> None:
    siblings = settings.good is not None and settings.bad is not None
    either = settings.good is not None or settings.bad is not None
    if settings.trait is not None:
        if settings.bad is not None or (settings.pairs is None) == (settings.good is None):
            raise UserError(
                f"{origin.at(where)}: with a trait give `pairs` or `good`, a file whose aligned "
                "answers get it"
            )
    elif (settings.pairs is not None) == either or either != siblings:
        raise UserError(
            f"{origin.at(where)}: give `pairs`, a file of questions with two answers, or `good` "
            "and `bad`, two chat files that answer the same questions"
        )
    condition = settings.condition
    for field, needing, taking in (
        ("system_prompt", ("training_system_prompt", "negated"), WITH_SYSTEM),
        ("training_questions", ("domain_cue",), ("domain_cue",)),
    ):
        given = getattr(settings, field) is not None
        if given and condition not in taking:
            place = origin.at(f"{where}.{field}")
            raise UserError(f"{place}: is for condition: {' or '.join(taking)}, not {condition}")
        if condition in needing and not given:
            place = origin.at(f"{where}.condition")
            raise UserError(f"{place}: {condition} needs the key {field}")


def _condition(settings: SuiteSettings, where: str, origin: Origin) -> Condition:
    questions: list[str] = []
    if settings.training_questions is not None:
        path = _file(settings.training_questions, f"{where}.training_questions", origin)
        file = read_data_file(path)
        if file.errors:
            raise UserError(file.errors[0])
        questions = [row.question for row in file.rows]
    return make_condition(
        settings.condition,
        system_prompt=settings.system_prompt,
        training_questions=questions,
    )


def _file(given: str, key: str, origin: Origin) -> Path:
    path = Path(find_input(given))
    if not path.is_file():
        raise UserError(f"{origin.at(key)}: no such file: {given}")
    return path
