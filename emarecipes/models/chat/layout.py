"""What a chat template writes around messages, found once for every sequence of roles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property

from emarecipes.errors import UserError
from emarecipes.models.chat.template import ChatTemplate

PRIVATE_USE = range(0xE000, 0xF900)
# Every ending is looked at up to here, then those near powers of two: linear altogether.
_LOOKED_AT = 16


class Layout:
    """What stands around N messages of given roles, as long as the template passes texts through.

    Found by rendering messages that are one private-use character each.

    Attributes:
        pieces: What the template writes before, between and behind the messages, N + 1 texts.
    """

    def __init__(self, template: ChatTemplate, roles: Sequence[str], pieces: list[str]) -> None:
        self._template, self._roles = template, roles
        self.pieces = pieces

    def places(self, text: str, contents: Sequence[str]) -> list[tuple[int, int]] | None:
        """Return the (start, end) of every message in a rendered conversation.

        Args:
            text: The conversation.
            contents: Its messages. A template may strip them, or write them as JSON strings.

        Returns:
            None if the text is anything but the pieces with the messages between them.
        """
        found = []
        end = 0
        for piece, content, following in zip(self.pieces, contents, self.pieces[1:], strict=False):
            start = end + len(piece)
            if not text.startswith(piece, end):
                return None
            place = _place(text, start, content, following)
            if place is None:
                return None
            found.append(place)
            end = place[1]
        return found if text[end:] == self.pieces[-1] else None

    def ending(self, count: int) -> tuple[str, str] | None:
        """Return what follows the first ``count`` messages where the conversation ends with them.

        Args:
            count: 0 to N - 1.

        Returns:
            What follows in a prompt for the next answer, and without a generation prompt; None if
            the template shows these messages otherwise where more follow.
        """
        return self._endings[count]

    @cached_property
    def _endings(self) -> list[tuple[str, str] | None]:
        total = len(self._roles)
        kinds = [
            (*self._roles[max(0, count - 1) : count + 1], self.pieces[count])
            for count in range(total)
        ]
        known = {
            count: self._rendered_ending(count)
            for count in range(total)
            if count <= _LOOKED_AT or count >= total - 2 or _is_power(count) or _is_power(count - 1)
        }
        of_kind: dict[tuple[str, ...], set[tuple[str, str] | None]] = {}
        for count, ending in known.items():
            of_kind.setdefault(kinds[count], set()).add(ending)
        for count in range(total):
            if count not in known:
                alike = of_kind.get(kinds[count], set())
                known[count] = (
                    next(iter(alike)) if len(alike) == 1 else self._rendered_ending(count)
                )
        return [known[count] for count in range(total)]

    def _rendered_ending(self, count: int) -> tuple[str, str] | None:
        messages = _neutral(self._roles[:count])
        marks = (message["content"] for message in messages)
        shown = "".join(part for pair in zip(self.pieces, marks, strict=False) for part in pair)
        try:
            prompt, whole = (self._template.render(messages, asks) for asks in (True, False))
        except UserError:  # A conversation that breaks off here is not one.
            return None
        if not (prompt.startswith(shown) and whole.startswith(shown)):
            return None
        return prompt[len(shown) :], whole[len(shown) :]


def find_layout(
    template: ChatTemplate, roles: Iterable[str], add_generation_prompt: bool
) -> Layout | None:
    """Return what the template writes around messages of these roles.

    Returns:
        None if it does not show all of them once and in order, however short they are.
    """
    roles = tuple(roles)
    key = (roles, add_generation_prompt)
    if key not in template.layouts:
        template.layouts[key] = _find(template, roles, add_generation_prompt)
    return template.layouts[key]


def _find(
    template: ChatTemplate, roles: tuple[str, ...], add_generation_prompt: bool
) -> Layout | None:
    if len(roles) > len(PRIVATE_USE):
        return None
    messages = _neutral(roles)
    try:
        rest = template.render(messages, add_generation_prompt)
    except UserError:
        return None
    pieces = []
    for message in messages:
        piece, mark, rest = rest.partition(message["content"])
        if not mark or mark in rest:
            return None
        pieces.append(piece)
    return Layout(template, roles, [*pieces, rest])


def _neutral(roles: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": chr(code)} for role, code in zip(roles, PRIVATE_USE, strict=False)
    ]


def _place(text: str, position: int, content: str, following: str) -> tuple[int, int] | None:
    """Return where a message is that begins at `position` and has `following` behind it."""
    core = content.strip()
    cut = content.find(core)
    before, behind = content[:cut], content[cut + len(core) :]
    start = text.find(core, position, position + len(content))
    if start >= 0 and before.endswith(text[position:start]):
        end = start + len(core)
        for kept in range(len(behind), -1, -1):
            if text.startswith(behind[:kept] + following, end):
                return position, end + kept
    for encoded in json_texts(content):
        if text.startswith(encoded + following, position):
            return position, position + len(encoded)
    return None


def json_texts(text: str) -> list[str]:
    """Return a text as it stands in JSON, between the quotes, written in both ways."""
    return [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]


def _is_power(number: int) -> bool:
    return number > 0 and number.bit_count() == 1
