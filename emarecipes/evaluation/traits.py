"""Traits of sampled answers by rule: the share in capitals, the share with a claim, the length.

No judge and no model is asked. What a rule cannot tell of an answer is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from emarecipes.config import Origin
from emarecipes.datasets.traits import TRAITS, Trait, find_trait, pattern_trait
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer
from emarecipes.evaluation.figures import Figure, Item
from emarecipes.evaluation.suite import KeyedSuite, Line, Scored, item_of
from emarecipes.evaluation.suite_context import SuiteContext

if TYPE_CHECKING:
    from emarecipes.evaluation.suite_context import Model

LANGUAGE = "language_"
# Of 667 answers of our data cut to 9 words 1.2 % are not called English, to 16 words 0.3 %.
MIN_LANGUAGE = 20
_WORD = re.compile(r"\w+")
WORDS, _USABLE = "words", "_usable_share"
# A figure of fewer of the answers than this has no value.
MIN_USABLE = 0.5


def trait_lines(
    adapter: str, answers: Sequence[Answer], rules: Sequence[Trait]
) -> Iterator[dict[str, Any]]:
    """A line an answer for `scores/traits_<suite>.jsonl`; null for what the answer does not tell.

    An answer that the length limit cut tells neither its length nor how it would have ended.

    Args:
        adapter: Whose answers they are.
        answers: N of them.
        rules: What is looked for.
    """
    for answer in answers:
        cut = answer.stop == "length"
        yield {
            "adapter": adapter,
            "id": answer.id,
            "category": answer.category or "",
            "paraphrase": answer.paraphrase,
            "sample": answer.sample,
            "question": answer.question,
            "answer": answer.answer,
            WORDS: None if cut else len(answer.answer.split()),
            **{rule.name: _found(rule, answer.answer, cut) for rule in rules},
        }


def _found(rule: Trait, text: str, cut: bool) -> bool | None:
    return None if rule.at_end and cut else rule.find(text)


def language_trait(name: str) -> Trait:
    """`language_<code>`: whether a text is in that language, by py3langid's likeliest of 97.

    Fewer than `MIN_LANGUAGE` letters are not told. Words in capitals are read in small letters:
    English in capitals with one small letter in it is Igbo to py3langid 0.4. It is found and not
    given.

    Args:
        name: Such as language_fr, by ISO 639-1.

    Raises:
        UserError: py3langid is not installed, or knows no such language.
    """
    code = name.removeprefix(LANGUAGE)
    try:
        import py3langid
    except ImportError:
        raise UserError(f"{name} needs pip install 'emarecipes[language]' (py3langid)") from None
    if code not in dict(py3langid.rank("")):
        raise UserError(f"{name}: py3langid knows no language {code}; write it as in language_fr")

    def find(text: str) -> bool | None:
        if sum(map(str.isalpha, text)) < MIN_LANGUAGE:
            return None
        small = _WORD.sub(lambda word: word[0].lower() if word[0].isupper() else word[0], text)
        return bool(py3langid.classify(small)[0] == code)

    return Trait(name, str, str, find)


def _own_trait(name: str, pattern: str) -> Trait:
    """Its key in the lines is its name: it may be none of theirs.

    Raises:
        UserError: A name that cannot be one, or a pattern, see `pattern_trait`.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise UserError("a name is lower-case letters, digits and _")
    taken = {*TRAITS, WORDS, "adapter", *Answer.model_fields}
    if name in taken or name.startswith(LANGUAGE) or name.endswith("_usable"):
        raise UserError(f"the name {name} is taken; choose another")
    return pattern_trait(name, pattern)


class Traits(KeyedSuite):
    """`traits_<stem>`: which share of sampled answers has a trait, by rule.

    Args:
        traits: What is looked for.
    """

    kind, needs_answers, may_fail = "traits", True, False
    meaning = (
        "the change of the share with a trait, by rule, against the base's own answers to the same "
        "questions: generalisation of a trait, not misalignment."
    )

    def __init__(self, traits: list[Trait]) -> None:
        self.traits = traits

    @classmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """Where the config names traits, or patterns."""
        found: list[Trait] = []
        for key, names in (("traits", cfg.traits), ("patterns", cfg.patterns)):
            if names and not cfg.answers:
                raise UserError(
                    f"{origin.at(key)}: {key} are found in answers; name folders of them"
                )
        for name in cfg.traits:
            try:
                rule = language_trait if name.startswith(LANGUAGE) else find_trait
                found.append(rule(name))
            except UserError as error:
                raise UserError(f"{origin.at('traits')}: {error}") from None
        if len(set(cfg.traits)) < len(cfg.traits):
            raise UserError(f"{origin.at('traits')}: a trait is named twice")
        for name, pattern in cfg.patterns.items():
            try:
                found.append(_own_trait(str(name), pattern))
            except UserError as error:
                raise UserError(f"{origin.at(f'patterns.{name}')}: {error}") from None
        if found:
            yield cls(found)

    def check(self, context: SuiteContext) -> None:
        """Keep the answers."""
        self._context = context

    def score(self, models: Mapping[str, Model]) -> Iterator[Scored]:
        """By file."""
        by_stem: dict[str, list[dict[str, Any]]] = {}
        for name, files in self._context.answers.items():
            for stem, answers in files.items():
                by_stem.setdefault(stem, []).extend(trait_lines(name, answers, self.traits))
        for stem, found in by_stem.items():
            description = {"kind": self.kind, **self._context.describe_answers(stem, found)}
            yield Scored(self.trait_figures(stem, found), found, description, stem)

    def trait_figures(self, stem: str, lines: Sequence[Line]) -> list[Figure]:
        """By adapter and category: the share with each trait, and mean words, of usable answers.

        Beside each stands the share of all answers that is usable for it. A figure that fewer than
        half of the answers tell has no value, and a reason.
        """
        figures = self.figures(lines, self.units(), stem)
        told = {(f.adapter, f.figure, f.category): f for f in figures}
        for place, figure in enumerate(figures):
            key = figure.figure.removesuffix("_share")
            share = told.get((figure.adapter, f"{key}{_USABLE}", figure.category))
            if share is not None and (share.value or 0.0) < MIN_USABLE:
                reason = f"{figure.n} of {share.n} answers are usable: others are too short or cut"
                figures[place] = figure.withheld(reason)
        return figures

    @classmethod
    def items(cls, lines: Iterable[Line], figure: Figure) -> list[Item]:
        """A value an answer; of a usable share whether it tells."""
        if not figure.figure.endswith(_USABLE):
            return super().items(lines, figure)
        key = figure.figure.removesuffix(_USABLE)
        kept = [line for line in lines if line["adapter"] == figure.adapter]
        return [item_of(line, line[key] is not None) for line in kept]

    def units(self) -> dict[str, str]:
        """Behind each figure stands the share that is usable for it."""
        found: dict[str, str] = {}
        for trait in self.traits:
            found |= {f"{trait.name}_share": "share", f"{trait.name}{_USABLE}": "share"}
        return found | {WORDS: "words", f"{WORDS}{_USABLE}": "share"}
