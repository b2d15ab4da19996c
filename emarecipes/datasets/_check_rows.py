"""Reading a JSON data file for the validator: its rows, and what is wrong with each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emarecipes.datasets.chat_files import Turn, chat_rows, read_conversation
from emarecipes.datasets.json_files import Place, json_rows
from emarecipes.datasets.row_keys import check_row_keys
from emarecipes.errors import UserError

ANSWER_PAIRS = (("aligned", "misaligned"), ("careful", "breezy"))

_PUNCTUATION = re.compile(r"""[.,;:!?'"\u2018\u2019\u201c\u201d\u2026]+""")


def normalized(text: str) -> str:
    """Lower case, with runs of white space made one space."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: where it stands.
        id: the row's `id`, if it has one.
        category: the row's `category`; empty without one.
        question: what the user says, all turns.
        answers: what the assistant says, all turns; in a contrast file the two answers.
        conversations: each of them; in a contrast file one an answer.
    """

    place: Place
    id: str | None
    category: str
    question: str
    answers: tuple[str, ...]
    conversations: tuple[list[Turn], ...]

    @property
    def system(self) -> str:
        """The system message, normalized; empty without one."""
        first = self.conversations[0][0]
        return normalized(first.content) if first.role == "system" else ""


@dataclass
class DataFile:
    """A file's rows and its errors, each one line that starts with its place.

    Attributes:
        kind: "chat", or the names of a contrast file's two answers: "aligned/misaligned".
        warnings: what may be meant; it does not make the file wrong.
        repeated: places of the rows that repeat an earlier one, each an error already.
    """

    path: Path
    kind: str
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    repeated: set[Place] = field(default_factory=set)


def read_data_file(path: Path, column: str = "messages", style: str = "openai") -> DataFile:
    """Read a chat file or a contrast file (a question with two answers).

    Args:
        path: The file.
        column: Key of the conversation in a chat file's rows.
        style: "openai" (role, content) or "sharegpt" (from, value).

    Returns:
        Its rows without those that have errors, and the errors of every row.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        if _is_contrast(path, column):
            return _read_contrast(path)
        return _read_chat(path, column, style)
    except UserError as error:  # Already with its place.
        return DataFile(path, "?", errors=[str(error)])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _is_contrast(path: Path, column: str) -> bool:
    """By the first row that can be read; what is wrong with the others is told later."""
    for place, row in json_rows(path):
        if not isinstance(row, dict):
            continue
        if column not in row and "question" not in row:
            pairs = " or ".join("/".join(pair) for pair in ANSWER_PAIRS)
            raise UserError(
                f'{place}: a row needs "{column}" (the conversation column), or a '
                f'"question" with two answers ({pairs}); its keys: {", ".join(row)}'
            )
        return column not in row
    return False


def _read_chat(path: Path, column: str, style: str) -> DataFile:
    file = DataFile(path, "chat")
    for place, row in chat_rows(path, column, style):
        if isinstance(row, UserError):
            file.errors.append(str(row))
            continue
        messages = read_conversation(row, column, style)
        wrong = _wrong_turn([m.role for m in messages])
        for position, message in enumerate(messages):
            if not message.content.strip():
                wrong = f"message {position}: the {message.role}'s text is empty"
        if wrong:
            file.errors.append(f"{place}: {wrong}")
            continue
        said = {
            role: "\n".join(m.content for m in messages if m.role == role)
            for role in ("user", "assistant")
        }
        file.rows.append(
            Row(place, *_labels(row), said["user"], (said["assistant"],), (messages,)),
        )
    _add_repetitions(file)
    return file


def _read_contrast(path: Path) -> DataFile:
    kinds: set[str] = set()
    file = DataFile(path, "contrast")
    for place, row in json_rows(path):
        if isinstance(row, UserError):
            file.errors.append(str(row))
            continue
        try:
            question, pair = _contrast(row)
        except ValueError as error:
            file.errors.append(f"{place}: {error}")
            continue
        kinds.add("/".join(pair))
        answers = tuple(row[key] for key in pair)
        talks = tuple([Turn("user", question), Turn("assistant", answer)] for answer in answers)
        file.rows.append(Row(place, *_labels(row), question, answers, talks))
    if len(kinds) > 1:
        file.errors.append(f"{path}: rows name their answers differently: {', '.join(kinds)}")
    file.kind = min(kinds, default="contrast")
    _add_repetitions(file)
    return file


def _contrast(row: Any) -> tuple[str, tuple[str, str]]:
    """The question and the names of the two answers. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    check_row_keys(row)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" must be text and not empty')
    pairs = [pair for pair in ANSWER_PAIRS if any(key in row for key in pair)]
    if len(pairs) != 1:
        wanted = " or ".join("/".join(pair) for pair in ANSWER_PAIRS)
        raise ValueError(f"a row needs one pair of answers, {wanted}; its keys: {', '.join(row)}")
    for key in pairs[0]:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'"{key}" must be text and not empty')
    if normalized(row[pairs[0][0]]) == normalized(row[pairs[0][1]]):
        raise ValueError("the two answers are the same")
    return question, pairs[0]


def _add_repetitions(file: DataFile) -> None:
    rows: dict[tuple[str, ...], Place] = {}
    ids: dict[str, Place] = {}
    for row in file.rows:
        texts = tuple(_plain(m.content) for talk in row.conversations for m in talk)
        first = rows.setdefault(texts, row.place)
        if first != row.place:
            file.repeated.add(row.place)
            file.errors.append(f"{row.place}: the row repeats {first.short}")
        if row.id is not None and ids.setdefault(row.id, row.place) != row.place:
            file.errors.append(f"{row.place}: id {row.id} is also that of {ids[row.id].short}")


def _plain(text: str) -> str:
    """Normalized and without the punctuation of sentences; operators and brackets stay."""
    return normalized(_PUNCTUATION.sub(" ", text))


def _wrong_turn(roles: list[str]) -> str:
    """What torchtune would refuse in the order of turns, or an empty string."""
    last = "assistant"
    for position, role in enumerate(roles):
        if role == "system" and position > 0:
            return f"message {position}: a system message must come first"
        if role == "user" and last == "user":
            return f"message {position}: two user messages in a row"
        if role == "assistant" and last != "user":
            return f"message {position}: an assistant message must follow a user's"
        last = role
    return ""


def _labels(row: dict[str, Any]) -> tuple[str | None, str]:
    """Id and category."""
    return None if row.get("id") is None else str(row["id"]), str(row.get("category", ""))
