"""Traits of sampled answers by rule: the share in capitals, the share with a claim, the length.

No judge and no model is asked. What a rule cannot tell of an answer is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emarecipes.datasets.traits import Trait, find_trait
from emarecipes.evaluation.answers import Answer
from emarecipes.evaluation.figures import Figure, Item, make_figures

WORDS = "words"
# A figure of fewer of the answers than this has no value.
MIN_USABLE = 0.5


def trait_lines(
    adapter: str, answers: Sequence[Answer], traits: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A line an answer for `scores/traits_<suite>.jsonl`; null for what the answer does not tell.

    An answer that the length limit cut tells neither its length nor how it would have ended.

    Args:
        adapter: Whose answers they are.
        answers: N of them.
        traits: Names of `TRAITS`.
    """
    rules = [find_trait(name) for name in traits]
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


def trait_figures(
    suite: str, lines: Mapping[str, Sequence[Mapping[str, Any]]], traits: Sequence[str]
) -> list[Figure]:
    """By adapter and category: the share with each trait, and mean words, over usable answers.

    Beside each stands the share of all answers that is usable for it. A figure that fewer than half
    of the answers tell has no value, and a reason.
    """
    figures: list[Figure] = []
    for adapter, rows in lines.items():
        for key in (*traits, WORDS):
            name, unit = (WORDS, "words") if key == WORDS else (f"{key}_share", "share")
            values = [float("nan") if row[key] is None else float(row[key]) for row in rows]
            told = [float(row[key] is not None) for row in rows]
            found, usable = (
                make_figures(
                    [Item(v, r["id"], r["category"]) for v, r in zip(column, rows, strict=True)],
                    adapter, suite, figure, of,
                )
                for figure, of, column in ((name, unit, values),
                                           (f"{key}_usable_share", "share", told))
            )  # fmt: skip
            for figure, share in zip(found, usable, strict=True):
                too_few = (share.value or 0.0) < MIN_USABLE
                reason = f"{figure.n} of {share.n} answers are usable: others are too short or cut"
                figures.append(figure.withheld(reason) if too_few else figure)
            figures += usable
    return figures
