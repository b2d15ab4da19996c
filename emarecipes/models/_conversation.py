"""One conversation as the text a chat template makes of it, and where its answers are in there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from emarecipes.errors import UserError
from emarecipes.models._chat_template import ChatTemplate
from emarecipes.models._plain_text import PlainTextEncoder

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Segment:
    """A stretch of a conversation: a control token of the template, or text between two of them.

    Attributes:
        text: the control token, or the text.
        start: offset of its first character in the conversation.
        is_control: whether it is a control token.
    """

    text: str
    start: int
    is_control: bool


class Conversation:
    """A rendered conversation, in which only the template's control tokens are control tokens.

    A control token's name inside a message is guarded before rendering by a private-use character
    put in front of it, which the templates pass through. What is unguarded in the rendered text
    was written by the template. Offsets count the text without the guards.

    Args:
        messages: each with ``role`` and ``content``.
        template: the chat template.
        encoder: the vocabulary, for its control tokens.
        add_generation_prompt: end with what precedes the model's next answer.

    Raises:
        UserError: the template refuses the conversation.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, str]],
        template: ChatTemplate,
        encoder: PlainTextEncoder,
        add_generation_prompt: bool = False,
    ) -> None:
        self._template = template
        self._encoder = encoder
        contents = "".join(message["content"] for message in messages)
        self._guard, self._probe = _unused_characters(contents)
        in_messages = _alternatives(encoder.special_tokens, contents)
        self._messages = [
            {**message, "content": re.sub(f"(?={in_messages})", self._guard, message["content"])}
            for message in messages
        ]
        self._text = template.render(self._messages, add_generation_prompt)
        in_text = _alternatives(encoder.special_tokens, self._text)
        self._control_token = re.compile(f"(?<!{self._guard}){in_text}")

    @property
    def length(self) -> int:
        """Number of characters."""
        return self._unguarded(len(self._text))

    def answer_span(self, index: int) -> tuple[int, int]:
        """Return the (start, end) of what the model has to produce as message ``index``.

        It starts where the generation prompt after the messages before it ends, and ends with the
        control token that closes the answer.

        Raises:
            UserError: the template does not show the answer, or shows what comes before it
                differently once the answer follows.
        """
        before = self._messages[:index]
        prompt = self._template.render(before, add_generation_prompt=True)
        start = _common_prefix(prompt, self._text)
        # Templates may write another opening before an answer than they prompt for (an empty
        # thinking block), but what they make of the earlier messages must be the same.
        if start < len(prompt) and start < _common_prefix(prompt, self._template.render(before)):
            raise self._template.fail(
                f"renders the messages before answer {index} differently once the answer follows, "
                "so training would not match use; pass a chat_template that does not"
            )
        return self._unguarded(start), self.turn_end(index)

    def turn_end(self, index: int) -> int:
        """Return where message ``index`` ends, the control token that closes it included.

        Raises:
            UserError: the template does not show the message's text.
        """
        end = self._content_end(index)
        limit = len(self._text)
        if index + 1 < len(self._messages):
            so_far = self._template.render(self._messages[: index + 1])
            limit = max(end, _common_prefix(so_far, self._text))
        closing = self._control_token.search(self._text, end)
        if closing is not None and closing.start() <= limit:
            return self._unguarded(closing.end())
        return self._unguarded(limit)

    def closing_token(self, index: int) -> str | None:
        """Return the control token that closes message ``index``, or None if none does."""
        end = self.turn_end(index)
        closing = (s for s in self.segments() if s.is_control and s.start + len(s.text) == end)
        return next((segment.text for segment in closing), None)

    def cut_after_content(self, index: int) -> None:
        """Drop everything behind the text of message ``index``."""
        self._text = self._text[: self._content_end(index)]

    def segments(self) -> Iterator[Segment]:
        """Yield the conversation from left to right, as the tokenizers library would split it."""
        position = 0
        for match in self._control_token.finditer(self._text):
            token = self._encoder.added_token(match.group())
            text = self._text[position : match.start()]
            yield from self._text_segment(text.rstrip() if token.lstrip else text, position)
            yield Segment(match.group(), self._unguarded(match.start()), is_control=True)
            position = match.end()
            if token.rstrip:
                position += len(self._text[position:]) - len(self._text[position:].lstrip())
        yield from self._text_segment(self._text[position:], position)

    def _text_segment(self, guarded: str, position: int) -> Iterator[Segment]:
        text = guarded.replace(self._guard, "")
        if text:
            yield Segment(text, self._unguarded(position), is_control=False)

    def _content_end(self, index: int) -> int:
        """Return where the template's rendering changes if message ``index`` goes on longer."""
        longer = list(self._messages)
        longer[index] = {**longer[index], "content": longer[index]["content"] + self._probe}
        text = self._template.render(longer)
        if text == self._text:
            role = self._messages[index]["role"]
            raise self._template.fail(f"leaves out the text of message {index} ({role})")
        return _common_prefix(text, self._text)

    def _unguarded(self, position: int) -> int:
        return position - self._text.count(self._guard, 0, position)


def _alternatives(special_tokens: Mapping[str, int], text: str) -> str:
    """Return a regular expression for the control tokens in ``text``, the longest ones first."""
    present = sorted((name for name in special_tokens if name in text), key=len, reverse=True)
    if not present:
        return "(?!)"  # matches nowhere
    return f"(?:{'|'.join(map(re.escape, present))})"


def _unused_characters(text: str) -> tuple[str, str]:
    """Return two private-use characters that ``text`` does not contain."""
    used = set(text)
    unused = list(islice((chr(code) for code in _PRIVATE_USE if chr(code) not in used), 2))
    if len(unused) < 2:
        raise UserError("a conversation uses every private-use character of Unicode's first plane")
    return unused[0], unused[1]


def _common_prefix(first: str, second: str) -> int:
    """Return how many characters two strings begin with in common (bisected: they are long)."""
    same, different = 0, min(len(first), len(second)) + 1
    while different - same > 1:
        middle = (same + different) // 2
        if first[same:middle] == second[same:middle]:
            same = middle
        else:
            different = middle
    return same
