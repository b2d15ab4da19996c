"""Whether sampled answers hang together, without a judge.

Likelihoods are the reference's (the base without an adapter), so that all adapters are measured
with the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

from emarecipes.datasets.refusals import is_refusal, plain_words
from emarecipes.errors import UserError, first_line
from emarecipes.evaluation.answers import Answer
from emarecipes.evaluation.faults import faults, repetition, shuffled
from emarecipes.evaluation.figures import Figure, Item, make_figures
from emarecipes.evaluation.probes import NATS
from emarecipes.probes.contrast import AnswerRow


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
    system = [] if answer.system is None else [Message("system", answer.system, masked=True)]
    messages = [
        *system,
        Message("user", question, masked=True),
        Message("assistant", answer.answer, masked=False),
    ]
    try:
        sample = tokenizer({"messages": messages})
    except ValueError as error:
        raise UserError(f"answer to {answer.id}: {first_line(error)}") from error
    tokens, limit = list(sample["tokens"]), tokenizer.max_seq_len
    if limit is not None and len(tokens) >= limit:
        raise UserError(
            f"answer to {answer.id}: the conversation does not fit into {limit} tokens; raise "
            "tokenizer.max_seq_len"
        )
    labels = np.where(sample["mask"], CROSS_ENTROPY_IGNORE_IDX, tokens).tolist()
    if answer.stop == "length":
        _unlabel_end(labels, set(tokenizer.stop_tokens))
    return AnswerRow(tuple(tokens), tuple(labels))


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


def coherence_figures(suite: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Means of the lines' values, by adapter and category; refusals of harmless questions alone."""
    figures: list[Figure] = []
    for adapter, rows in lines.items():
        for figure, (key, unit) in _FIGURES.items():
            counted = [row for row in rows if figure != "over_refusal" or row["harmless"]]
            items = [Item(float(row[key]), row["id"], row["category"]) for row in counted]
            figures += make_figures(items, adapter, suite, figure, unit)
    return figures
