"""Whether sampled answers hang together, without a judge.

Likelihoods are the reference's (the base without an adapter), so that all adapters are measured
with the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from emarecipes.config import Origin
from emarecipes.datasets.refusals import check_refusal_words, is_refusal, plain_words
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer, faults, repetition, shuffled
from emarecipes.evaluation.figures import NATS, REFERENCE, Figure, Item
from emarecipes.evaluation.suite import KeyedSuite, Line, Scored
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.probes.contrast import AnswerRow, answer_row
from emarecipes.probes.pairs import exchange

if TYPE_CHECKING:
    from emarecipes.evaluation.suite_context import Model


def other_question(answers: Sequence[Answer]) -> dict[tuple[str, int], str | None]:
    """For each question and paraphrase, the first phrasing of the next question, cyclically.

    Questions are in the order of their ids, so that the choice does not depend on the adapter or on
    the order of answers. None where there is only one question.
    """
    phrasings: dict[str, dict[int, str]] = {}
    for answer in answers:
        phrasings.setdefault(answer.id, {})[answer.paraphrase] = answer.question
    ids = sorted(phrasings)
    following = {
        name: phrasings[ids[(place + 1) % len(ids)]] if len(ids) > 1 else None
        for place, name in enumerate(ids)
    }
    found: dict[tuple[str, int], str | None] = {}
    for answer in answers:
        other = following[answer.id]
        found[answer.id, answer.paraphrase] = None if other is None else other[min(other)]
    return found


@dataclass(frozen=True)
class CoherenceRows:
    """What the reference is to score of one file.

    Attributes:
        rows: Answers behind their own question, behind another one, and their words shuffled.
        own: For each answer, the place of its row; None for an answer without words.
        other: The same behind the other question.
        shuffled: The same of its words in another order, behind its own question.
        closing: For each answer, how many tokens from the one that ends it; 0 if it was cut.
    """

    rows: list[AnswerRow]
    own: list[int | None]
    other: list[int | None]
    shuffled: list[int | None]
    closing: list[int]


def coherence_rows(answers: Sequence[Answer], tokenizer: Any) -> CoherenceRows:
    """Tokenize answers behind their own and another question, under their own system prompt.

    And their words in another order behind their own.

    The tokens that close an answer count unless the length limit cut it.

    Raises:
        UserError: A conversation that does not fit into the tokenizer's `max_seq_len`.
    """
    others = other_question(answers)
    found = CoherenceRows([], [], [], [], [])
    stop_tokens = set(tokenizer.stop_tokens)
    for answer in answers:
        other = others[answer.id, answer.paraphrase]
        mixed = answer.model_copy(update={"answer": shuffled(answer.answer)})
        for text, question, places in (
            (answer, answer.question, found.own),
            (answer, other, found.other),
            (mixed, answer.question, found.shuffled),
        ):
            if question is None or not text.answer.strip():
                places.append(None)
                continue
            places.append(len(found.rows))
            found.rows.append(_row(text, question, tokenizer))
        own = found.own[-1]
        found.closing.append(0 if own is None else _closing(found.rows[own].labels, stop_tokens))
    return found


def _closing(labels: Sequence[int], stop_tokens: set[int]) -> int:
    """How many labelled tokens there are from the last stop token on; 0 without one."""
    trained = [label for label in labels if label != CROSS_ENTROPY_IGNORE_IDX]
    stops = [place for place, label in enumerate(trained) if label in stop_tokens]
    return len(trained) - stops[-1] if stops else 0


def _row(answer: Answer, question: str, tokenizer: Any) -> AnswerRow:
    try:
        row = answer_row(tokenizer, exchange(question, answer.answer, answer.system))
    except UserError as error:
        raise UserError(f"answer to {answer.id}: {error}") from error
    if answer.stop != "length":
        return row
    labels = list(row.labels)
    _unlabel_end(labels, set(tokenizer.stop_tokens))
    return AnswerRow(row.tokens, tuple(labels))


def _unlabel_end(labels: list[int], stop_tokens: set[int]) -> None:
    """Ignore the last stop token and what follows it."""
    for place in range(len(labels) - 1, -1, -1):
        if labels[place] in stop_tokens:
            labels[place:] = [CROSS_ENTROPY_IGNORE_IDX] * (len(labels) - place)
            return


def coherence_lines(
    adapter: str,
    answers: Sequence[Answer],
    rows: CoherenceRows,
    nlls: Sequence[NDArray[Any]],
    refusal_words: Sequence[str] | None,
) -> Iterator[dict[str, Any]]:
    """A line an answer for `scores/answers_<suite>.jsonl`.

    Args:
        adapter: Whose answers they are.
        answers: N of them.
        rows: From `coherence_rows`.
        nlls: Token NLLs of its rows under the reference.
        refusal_words: See `is_refusal`.
    """
    means = [float(values.mean(dtype=np.float64)) for values in nlls]

    def mean(place: int | None) -> float:
        return float("nan") if place is None else means[place]

    for number, answer in enumerate(answers):
        own, closing = rows.own[number], rows.closing[number]
        nll, nll_other = mean(own), mean(rows.other[number])
        order = mean(rows.shuffled[number]) - nll
        ending = float("nan") if own is None or not closing else float(nlls[own][-closing])
        cut = answer.stop == "length"
        wrong = faults(answer.question, answer.answer, cut=cut, order=order, ending=ending)
        yield {
            "adapter": adapter,
            "id": answer.id,
            "category": answer.category or "",
            "harmless": answer.harmless,
            "paraphrase": answer.paraphrase,
            "sample": answer.sample,
            "question": answer.question,
            "answer": answer.answer,
            "coherent": not wrong,
            "faults": wrong,
            "order": order,
            "ending": ending,
            "relevance": nll_other - nll,
            "repetition": repetition(answer.answer),
            "truncated": answer.stop == "length",
            "empty": not plain_words(answer.answer),
            "refusal": is_refusal(answer.answer, refusal_words),
            "reference_nll": nll,
        }


_FIGURES = {
    "coherent": ("coherent", "share"),
    "relevance": ("relevance", NATS),
    "repetition": ("repetition", "mean share"),
    "truncated_share": ("truncated", "share"),
    "empty_share": ("empty", "share"),
    "over_refusal": ("refusal", "share"),
    "reference_nll": ("reference_nll", NATS),
}


class Coherence(KeyedSuite):
    """`answers_<stem>`: whether sampled answers hang together, by rule and the reference.

    Args:
        refusal_words: See `is_refusal`.
    """

    kind, needs_answers, may_fail = "answers", True, False

    def __init__(self, refusal_words: list[str] | None = None) -> None:
        self.refusal_words = refusal_words
        self._files: dict[str, dict[str, tuple[Sequence[Answer], CoherenceRows]]] = {}

    @classmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """Where the config names answers, unless it says `coherence: false`."""
        check_refusal_words(cfg.refusal_words, origin)
        if cfg.answers and cfg.coherence:
            yield cls(None if cfg.refusal_words is None else list(cfg.refusal_words))

    def check(self, context: SuiteContext) -> None:
        """Tokenize what the reference is to score."""
        self._context = context
        self._files = {
            name: {stem: (a, coherence_rows(a, context.tokenizer)) for stem, a in files.items()}
            for name, files in context.answers.items()
        }
        for files in self._files.values():
            for _, rows in files.values():
                context.check_rows(rows.rows)

    def score(self, models: Mapping[str, Model]) -> Iterator[Scored]:
        """By file, all under the reference."""
        by_stem: dict[str, list[dict[str, Any]]] = {}
        for name, files in self._files.items():
            for stem, (answers, rows) in files.items():
                nlls = models[REFERENCE].token_nlls(rows.rows, kept_as="answers")
                lines = coherence_lines(name, answers, rows, nlls, self.refusal_words)
                by_stem.setdefault(stem, []).extend(lines)
        for stem, found in by_stem.items():
            harmless = {line["id"] for line in found if line["harmless"]}
            description = {
                "kind": self.kind,
                **self._context.describe_answers(stem, found),
                "harmless_questions": len(harmless),
                "refusal_words": self.refusal_words,
            }
            yield Scored(self.figures(found, self.units(), stem), found, description, stem)

    @classmethod
    def items(cls, lines: Iterable[Line], figure: Figure) -> list[Item]:
        """A value an answer; refusals of harmless questions alone."""
        key, _ = _FIGURES.get(figure.figure, (figure.figure, ""))
        kept = (line for line in lines if figure.figure != "over_refusal" or line["harmless"])
        return super().items(kept, replace(figure, figure=key))

    def units(self) -> dict[str, str]:
        """Of all."""
        return {figure: unit for figure, (_, unit) in _FIGURES.items()}
