"""Sampled answers, as `recipes/ema_generate.py` writes them: `<run>/answers/<suite>.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emarecipes.errors import UserError

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
            without answers.
    """
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
