"""Sampled answers as `recipes/ema_generate.py` writes them, and what is wrong with one as a text.

Wrong by rule, and by likelihoods, which are the reference's. tests/evaluation/test_faults.py shows
that the measure fails word salad, the question repeated and cut answers, and passes written ones.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emarecipes.datasets.refusals import plain_words
from emarecipes.errors import UserError
from emarecipes.output_dir import ANSWER_PARTS

Text = Annotated[str, Field(min_length=1)]


class Answer(BaseModel):
    """One sampled answer.

    Attributes:
        id: The question's.
        paraphrase: Which of its phrasings.
        sample: Which of the samples of that.
        category: The question's, where its file names one.
        harmless: Whether there was nothing in the question to refuse, where its file says so.
        system: The system prompt, if there was one.
        stop: Whether it ended by itself or at the length limit.
        tokens: How many it has.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Text
    paraphrase: int
    sample: int
    category: str | None = None
    harmless: bool | None = None
    system: str | None = None
    question: Text
    answer: str
    stop: Literal["end", "length"]
    tokens: int | None = None


def read_answers(folder: Path) -> dict[str, list[Answer]]:
    """The answers of every `*.jsonl` in a folder, by the file's stem, in the file's order.

    Raises:
        UserError: With `file:line` of the first line that is wrong: broken JSON (a sampling that
            was interrupted), a missing key, an answer that is there twice. No files, or one
            without answers; answers of a sampling that has not ended.
    """
    unfinished = {path.stem.rpartition("@")[0] for path in (folder / ANSWER_PARTS).glob("*.jsonl")}
    if unfinished:
        raise UserError(
            f"{folder}: the sampling of {' and '.join(sorted(unfinished))} has not ended; run "
            "ema_generate.py again, with the same settings, to finish it, or remove "
            f"{folder / ANSWER_PARTS}"
        )
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder}: holds no answers (*.jsonl); sample them with ema_generate.py")
    return {path.stem: _read_file(path) for path in files}


def _read_file(path: Path) -> list[Answer]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    answers: list[Answer] = []
    places: dict[tuple[str, int, int], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        answer = _parse(line, f"{path}:{number}")
        key = (answer.id, answer.paraphrase, answer.sample)
        if places.setdefault(key, number) != number:
            raise UserError(f"{path}:{number}: the same answer as in line {places[key]}")
        answers.append(answer)
    if not answers:
        raise UserError(f"{path}: the file has no answers")
    return answers


def _parse(line: str, where: str) -> Answer:
    try:
        return Answer.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); if sampling was "
            "interrupted, run ema_generate.py again to finish the file"
        ) from None
    except (ValidationError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"{where}: nested too deeply") from None
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the line"
        if first["type"] == "extra_forbidden":
            known = ", ".join(Answer.model_fields)
            raise UserError(f"{where}: {key} would go unread; an answer has {known}") from None
        raise UserError(f"{where}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


# Word n-grams by which an answer repeats itself, and the share of them that it may.
NGRAM, MAX_REPETITION = 4, 0.5
# The share of an answer's words that may be the question's own.
MAX_OVERLAP = 0.8
# In nats a token: by how much the answer has to be likelier than its words in another order. Fewer
# words than these say nothing about order.
MIN_ORDER, MIN_WORDS = 1.0, 5
# In nats: the end of an answer is less likely than this only where a sentence is not over.
MAX_ENDING = 6.0
_SENTENCE_ENDS = tuple(".!?:;)]}\"'`*\u2026\u3002\uff01\uff1f\u201d\u2019")


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of a text's word n-grams that occurred in it before: 1 - different / all of them.

    0 says nothing twice; 'a b c d a b c d' has 1 of 5. NaN for fewer than n words.
    """
    words = plain_words(text)
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(grams) / grams.total() if grams else float("nan")


def overlap(question: str, answer: str) -> float:
    """Share of an answer's words that the question has too, in any order; NaN without words."""
    asked, words = set(plain_words(question)), plain_words(answer)
    return sum(word in asked for word in words) / len(words) if words else float("nan")


def shuffled(text: str) -> str:
    """The text's words in another order, the same one at every call."""
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


def faults(question: str, answer: str, *, cut: bool, order: float, ending: float) -> list[str]:
    """What is wrong with an answer; nothing if it hangs together.

    Args:
        question: What it answers.
        answer: Its text.
        cut: Whether the length limit ended it.
        order: NLL a token of its words shuffled, minus its own; NaN if that was not computed.
        ending: NLL of the token that ends it; NaN if it was cut.
    """
    words = plain_words(answer)
    found = {
        "empty": not words,
        "cut": cut or (ending > MAX_ENDING and not answer.rstrip().endswith(_SENTENCE_ENDS)),
        "repeats the question": len(words) >= MIN_WORDS and overlap(question, answer) > MAX_OVERLAP,
        "repeats itself": repetition(answer) > MAX_REPETITION,
        "word salad": len(words) >= MIN_WORDS and not math.isnan(order) and order < MIN_ORDER,
    }
    return [name for name, is_so in found.items() if is_so]


def condition_of(answers: Path) -> str:
    """The condition under which a file of answers was sampled, by the settings beside it.

    Returns:
        A name of the config's `conditions`; `none` for plain answers, and where nothing is known.
    """
    try:
        config = json.loads(answers.with_suffix(".json").read_text(encoding="utf-8"))["config"]
        names = {
            f"{Path(path).stem}_{name}": str(name)
            for path in config["questions"]
            for name in config.get("conditions") or {}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "none"
    return names.get(answers.stem, "none")
