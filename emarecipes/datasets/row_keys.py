"""What else a row may say beside its texts: honoured where the meaning is plain, refused otherwise.

A key that would be trained on, or dropped, without a word makes another data set of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from emarecipes.errors import UserError

# Of a message: whether it is trained on. 0, 1, true or false.
MASKS = ("weight", "train", "loss")

# Of a message: what describes it and says nothing to a model. A message is small and its keys are
# few, so that everything else is refused.
_DESCRIPTION = {
    *("id", "uuid", "index", "message_id", "parent_id", "turn", "turn_identifier", "timestamp"),
    *("created_at", "create_time", "date", "model", "language", "lang", "country", "source"),
    *("label", "category", "topic", "toxic", "redacted", "hashed_ip", "header", "state"),
    *("score", "rank"),
}

# Of a row, which may have keys of any kind: what would change its loss.
_LOSS = {
    *("weight", "weights", "sample_weight", "train", "trainable", "training", "loss", "loss_mask"),
    *("mask", "masked", "masks"),
}
# And what would change the conversation.
_MEANING = _LOSS | {
    *("system", "system_prompt", "system_message", "context", "contexts", "document", "documents"),
    *("history", "instruction", "instructions", "input", "tools", "functions", "function_call"),
    *("tool_calls", "tool_choice", "image", "images", "video", "videos", "audio", "audios"),
    *("reasoning", "reasoning_content", "thinking", "chat_template"),
    *("chat_template_kwargs", "enable_thinking", "response_format"),
    *("messages", "conversation", "conversations"),
}


def check_row_keys(row: Mapping[str, Any], read: Collection[str] = ()) -> None:
    """Refuse what a row says and nobody reads.

    Args:
        row: A row of any kind.
        read: The keys that its reader does read.

    Raises:
        UserError: Without the row's place.
    """
    for key, value in row.items():
        if "system" in read and _is_nearly_system(key) and says_something(value):
            raise UserError(f'unknown key "{key}" (did you mean system?); if not, take it out')
        if key in _MEANING and key not in read and says_something(value):
            hint = "; write it as `system`" if key in ("system_prompt", "system_message") else ""
            hint = hint if "system" in read else ""
            raise UserError(
                f'the row\'s "{key}" would go unread{hint}; if it means nothing here, take it out'
            )


def check_text_row(row: Mapping[str, Any], column: str) -> None:
    """Refuse a row of plain text that is none, or that says what its loss is to be.

    Its other columns are others: the config names the one that is trained.

    Args:
        row: The row.
        column: The text's.

    Raises:
        UserError: Without the row's place.
    """
    if column not in row:
        raise UserError(f'the row has no "{column}"; it has {", ".join(map(repr, row))}')
    if not isinstance(row[column], str):
        raise UserError(f"{column} must be text, not {row[column]!r:.60}")
    check_row_keys(row, {column} | (row.keys() - _LOSS))


@lru_cache
def _is_nearly_system(key: str) -> bool:
    return key != "system" and bool(difflib.get_close_matches(key, ["system"], cutoff=0.85))


def system_of(row: Mapping[str, Any]) -> str | None:
    """The row's own `system`, the prompt before its conversation.

    Raises:
        UserError: It is no text.
    """
    system = row.get("system")
    if not says_something(system):
        return None
    if not isinstance(system, str):
        raise UserError(f"system must be text, not {system!r:.60}")
    return system


def is_trained(message: Mapping[str, Any], texts: Collection[str]) -> bool | None:
    """Whether a message is to be trained on, or None where it says nothing of that.

    Args:
        message: One turn.
        texts: The keys of its role and its text.

    Raises:
        UserError: A weight other than 0 and 1, keys that contradict each other, a key that nobody
            reads.
    """
    said: dict[str, bool] = {}
    for key, value in message.items():
        if key in MASKS and value is not None:
            if not isinstance(value, int | float) or value not in (0, 1):
                raise UserError(f"{key} must be 0 or 1, not {value!r:.60}")
            said[key] = bool(value)
        elif key not in _DESCRIPTION and key not in texts and says_something(value):
            raise UserError(
                f'"{key}" would go unread; if it means nothing here, take it out. Read are '
                f"{', '.join([*texts, *MASKS])}"
            )
    if len(set(said.values())) > 1:
        raise UserError(f"{' and '.join(said)} contradict each other")
    return next(iter(said.values()), None)


def says_something(value: Any) -> bool:
    """Not null, "", [] or {}: tables fill in what a row leaves out. False and 0 say something."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
