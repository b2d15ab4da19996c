"""From a row to messages: torchtune's own step, with the row checked first, whatever its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchtune.data import (
    AlpacaToMessages,
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
)
from torchtune.datasets import TextCompletionDataset
from torchtune.datasets._sft import SFTTransform

from emarecipes.datasets.chat_files import Turn, read_conversation
from emarecipes.datasets.row_keys import check_row_keys, check_text_row, system_of
from emarecipes.errors import RowError, UserError, reason

# What a row that is not as expected raises in torchtune's transforms and in tokenizers.
ROW_ERRORS = (ValueError, TypeError, KeyError, AttributeError, UnboundLocalError)


class CheckedTransform(SFTTransform):
    """torchtune's transform of a row, whose messages are made by `row_messages`.

    Raises:
        UserError: A row is wrong. `RowError`, if the row knows its place.
    """

    def __init__(self, message_transform: Any = None, model_transform: Any = None) -> None:
        def checked(row: Mapping[str, Any]) -> Mapping[str, Any]:
            return row_messages(row, message_transform)

        super().__init__(message_transform and checked, model_transform)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The row's tokens and labels."""
        try:
            return dict(super().__call__(sample))
        except ROW_ERRORS as error:
            place = getattr(sample, "place", None)
            if place is None:
                raise
            raise RowError(f"{place}: {reason(error)}") from error


class CheckedTexts(TextCompletionDataset):
    """torchtune's rows of plain text, each checked as it is read.

    Raises:
        UserError: A row is wrong. `RowError`, if the row knows its place.
    """

    def _prepare_sample(self, sample: Mapping[str, Any]) -> dict[str, list[int]]:
        try:
            check_text_row(sample, self._column)
            return dict(super()._prepare_sample(sample))
        except ROW_ERRORS as error:
            place = getattr(sample, "place", None)
            if place is None:
                raise
            raise RowError(f"{place}: {reason(error)}") from error


def row_messages(
    row: Mapping[str, Any], transform: Callable[[Any], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What torchtune's transform makes of a row that passed the checks.

    The transform itself takes the text of the message before for one whose content is of another
    type, and drops what it does not know.

    Raises:
        UserError: Without the row's place.
    """
    turns: list[Turn] = []
    system = system_of(row)
    if isinstance(transform, OpenAIToMessages):
        turns = read_conversation(row, transform._column_map["messages"], "openai")
    elif isinstance(transform, ShareGPTToMessages):
        turns = read_conversation(row, transform._column_map["conversations"], "sharegpt")
    elif isinstance(transform, InputOutputToMessages | AlpacaToMessages):
        names = transform.column_map or {}
        needed = ["input", "output"]
        if isinstance(transform, AlpacaToMessages):
            needed = ["instruction", "output"]
            names = {"instruction": "instruction", "input": "input", "output": "output"} | names
        for column in (names[key] for key in needed):
            if not isinstance(row.get(column), str):
                raise UserError(f"{column} must be text, not {row.get(column)!r:.60}")
        check_row_keys(row, ("system", *names.values()))
    else:
        return transform(row)  # A user's own: its rows are its own too.
    made = dict(transform(row))
    # A system prompt of the config takes the place of all that rows have.
    if system is not None and getattr(transform, "new_system_prompt", None) is None:
        said = made["messages"][0].role == "system"
        own = [] if said else [Message(role="system", content=system, masked=True, eot=True)]
        made["messages"] = own + made["messages"]
    spoken = [message for message in made["messages"] if message.role != "system"]
    for message, turn in zip(spoken, [t for t in turns if t.role != "system"], strict=bool(turns)):
        if turn.trained and message.masked:
            raise UserError(
                f"a message of the {turn.role} is to be trained on; only answers are, or every "
                "message, with train_on_input: true"
            )
        message.masked = message.masked or turn.trained is False
    for message in spoken:
        if message.role == "assistant" and not message.masked and _is_blank(message):
            raise UserError(
                "an answer without text, of which the end alone would be trained: take the row out"
            )
    return made


def _is_blank(message: Message) -> bool:
    return not message.contains_media and not message.text_content.strip()
