"""The tokenizer that rows see: defenses change their messages first, and must leave a trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torchtune.data import Message

from emarecipes.defenses import Defense
from emarecipes.errors import UserError


class DefendedTokenizer:
    """A model transform that lets defenses change a row's messages first. Else the tokenizer's own.

    Args:
        tokenizer: torchtune's model transform.
        defenses: Applied in order of name, so that the order in the config does not matter.
        source: What the rows are: "task" or "safe".
    """

    def __init__(self, tokenizer: Any, defenses: Sequence[Defense], source: str = "task") -> None:
        self._tokenizer = tokenizer
        self._defenses = [d for d in defenses if d.has("transform_messages")]
        self._source = source
        # By place, of all sources' rows: whether it changed a row's tokens, or its messages alone.
        self._changed: dict[int, bool] = {}

    def for_source(self, source: str) -> DefendedTokenizer:
        """The same for rows of another source."""
        other = DefendedTokenizer(self._tokenizer, self._defenses, source)
        other._changed = self._changed
        return other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Tokenize `sample["messages"]` after every defense has had its say.

        Raises:
            UserError: There is no answer; or the tokenizer refuses the messages, with the names of
                the defenses if it takes them as they were.
        """
        messages: list[Message] = sample["messages"]
        if not any(message.role == "assistant" for message in messages):
            raise UserError("the row has no assistant message, so there is nothing to learn")
        given = copy.deepcopy(messages) if self._defenses else messages
        for place, defense in enumerate(self._defenses):
            if self._changed.get(place):
                messages = defense.transform_messages(messages, self._source)
                continue
            before = copy.deepcopy(messages)  # A user's own defense may change them in place.
            messages = defense.transform_messages(messages, self._source)
            if _texts(before) != _texts(messages):
                one = self._encode(sample, before, inference)
                other = self._encode_changed(sample, given, messages, inference)
                self._changed[place] = not _same(one, other)
        return self._encode_changed(sample, given, messages, inference)

    def encode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's own, for rows that no defense would change.

        Raises:
            UserError: A defense changes messages of this source, and these rows have none.
        """
        self._refuse_without_messages()
        return self._tokenizer.encode(*args, **options)

    def tokenize_messages(self, *args: Any, **options: Any) -> Any:
        """As `encode`: the messages went past the defenses."""
        self._refuse_without_messages()
        return self._tokenizer.tokenize_messages(*args, **options)

    def _refuse_without_messages(self) -> None:
        for defense in self._defenses:
            row = [Message("user", "a", masked=True), Message("assistant", "b")]
            if _texts(defense.transform_messages(copy.deepcopy(row), self._source)) != _texts(row):
                raise UserError(
                    f"{type(defense).__name__} changes messages, and the data set encodes its rows "
                    "without any; use a data set of conversations, such as "
                    "torchtune.datasets.chat_dataset, or leave the defense out"
                )

    def _encode_changed(
        self,
        sample: dict[str, Any],
        given: list[Message],
        messages: list[Message],
        inference: bool,
    ) -> dict[str, Any]:
        try:
            return self._encode(sample, messages, inference)
        except UserError as error:
            if _texts(given) == _texts(messages):
                raise
            try:
                self._encode(sample, given, inference)
            except UserError:
                raise error from None
            names = " and ".join(type(defense).__name__ for defense in self._defenses)
            raise UserError(f"with its messages as {names} changed them: {error}") from error

    def _encode(
        self, sample: dict[str, Any], messages: list[Message], inference: bool
    ) -> dict[str, Any]:
        row: dict[str, Any] = self._tokenizer({**sample, "messages": messages}, inference=inference)
        return row

    def check(self) -> None:
        """Once all rows were read: see whether each defense that changes messages changed tokens.

        Raises:
            UserError: One changed none.
        """
        for place, defense in enumerate(self._defenses):
            changed = self._changed.get(place)
            if changed:
                continue
            what = type(defense).__name__
            if changed is None:
                raise UserError(
                    f"{what} changed the messages of no row; it needs conversations, of the source "
                    "that it acts on (text_completion_dataset has no messages)"
                )
            raise UserError(
                f"{what} changed messages, and not one token of any row: "
                "the chat template leaves out what it added; pass a chat_template that shows it"
            )


def _texts(messages: Sequence[Message]) -> list[tuple[Any, ...]]:
    return [(message.role, message.content, message.masked) for message in messages]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        np.array_equal(one[key], other[key]) for key in ("tokens", "labels", "mask") if key in one
    )
