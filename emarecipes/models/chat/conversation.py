"""One conversation as the text a chat template makes of it, and where its answers are in there."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from emarecipes.errors import UserError
from emarecipes.models.chat.layout import PRIVATE_USE, find_layout
from emarecipes.models.chat.plain_text import PlainTextEncoder
from emarecipes.models.chat.shown_text import check_shown
from emarecipes.models.chat.template import ChatTemplate


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

    Where the text is the messages between what the template writes around any of their roles, the
    messages' places are read off it, in time linear in the number of messages. Else they are found
    by rendering the conversation again, changed or cut off.

    Args:
        messages: each with ``role`` and ``content``.
        template: the chat template.
        encoder: the vocabulary, for its control tokens.
        add_generation_prompt: end with what precedes the model's next answer.

    Raises:
        UserError: the template refuses the conversation, or does not show all of its text.
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
        self._guard, *marks = _unused_characters(contents, 2 * len(messages) + 2)
        self._probe = marks[0]
        in_messages = _alternatives(encoder.special_tokens, contents)
        self._messages = [
            {**message, "content": re.sub(f"(?={in_messages})", self._guard, message["content"])}
            for message in messages
        ]
        self._text = template.render(self._messages, add_generation_prompt)
        self._guards = [match.start() for match in re.finditer(self._guard, self._text)]
        in_text = _alternatives(encoder.special_tokens, self._text)
        self._longest_control = max(map(len, encoder.special_tokens), default=0)
        self._control_token = re.compile(f"(?<!{self._guard}){in_text}")
        self._prompted = add_generation_prompt
        self._layout = find_layout(template, (m["role"] for m in messages), add_generation_prompt)
        self._places = self._read_places()
        if self._places is None:
            check_shown(
                template, self._messages, add_generation_prompt, self._text,
                guard=self._guard, marks=marks,
            )  # fmt: skip
        # What the template looks for in a text, it may treat otherwise where less or more follows.
        self._is_regular = self._places is not None and not template.may_look_for(contents)

    @property
    def length(self) -> int:
        """Number of characters."""
        return self._unguarded(len(self._text))

    @property
    def answers_are_marked(self) -> bool:
        """Whether the template says by ``{% generation %}`` what of a message is the answer."""
        return self._template.marks_answers

    def answer_spans(self, index: int) -> list[tuple[int, int]]:
        """Return the (start, end) of what the model has to produce as message ``index``.

        It starts where the generation prompt after the messages before it ends, and ends with the
        control token that closes the answer. Where the template marks its answers, it is what is
        marked, perhaps in several pieces.

        Raises:
            UserError: the template does not show the answer, or shows what comes before it
                differently once the answer follows; it marks others and not this one.
        """
        at, prompt = self._broken_off(index, add_generation_prompt=True)
        same = self._common_from(at, prompt)
        # Templates may write another opening before an answer than they prompt for (an empty
        # thinking block), but what they make of the earlier messages must be the same.
        if same < len(prompt):
            # An answer may begin as what is missing does, which is the answer's.
            marked = [*self._messages[:index], self._with(index, before=self._probe)]
            same = min(same, _common_prefix(prompt, self._template.render(marked)[at:]))
            if same < _common_prefix(prompt, self._broken_off(index)[1]):
                raise self._template.fail(
                    f"renders the messages before answer {index} differently once the answer "
                    "follows, so training would not match use; pass a chat_template that does not"
                )
            self._template.warn_once(
                f"asks for an answer with {prompt[same:]!r} and shows message {index} without: an "
                "answer like it is trained on, or scored, behind another prompt than it is sampled "
                "behind; template_arguments may change that, or training on last answers alone"
            )
        if self.answers_are_marked:
            return self._marked_spans(index)
        return [(self._unguarded(at + same), self.turn_end(index))]

    def _marked_spans(self, index: int) -> list[tuple[int, int]]:
        behind = self._content_end(index - 1) if index else 0
        end = self._content_end(index)
        found = [span for span in self._marked if behind <= span[0] <= end]
        if not found:
            raise self._template.fail(
                f"marks answers with generation tags, and not answer {index}: nothing of it would "
                "be trained; pass a chat_template that marks it, or none"
            )
        return [(self._unguarded(start), self._unguarded(end)) for start, end in found]

    @cached_property
    def _marked(self) -> list[tuple[int, int]]:
        """The (start, end) in the guarded text of all that the template marks as answers."""
        marks = _unused_characters(self._text, 2)
        rendered = self._template.render(self._messages, self._prompted, (marks[0], marks[1]))
        pieces = re.split(f"([{''.join(marks)}])", rendered)
        if "".join(pieces[::2]) != self._text:
            raise self._template.fail("changes with the marks that its generation tags stand for")
        spans, position, starts = [], 0, []
        for text, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            position += len(text)
            if mark == marks[0]:
                starts.append(position)
            elif mark == marks[1]:
                spans.append((starts.pop(), position))
        return spans

    def turn_end(self, index: int) -> int:
        """Return where message ``index`` ends, the control token that closes it included.

        Raises:
            UserError: the template does not show the message's text.
        """
        end = self._content_end(index)
        limit = len(self._text)
        if index + 1 < len(self._messages):
            at, so_far = self._broken_off(index + 1)
            limit = max(end, at + self._common_from(at, so_far))
        closing = self._control_token.search(self._text, end, limit + self._longest_control)
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
            while token.rstrip and self._text[position : position + 1].isspace():
                position += 1
        yield from self._text_segment(self._text[position:], position)

    def _text_segment(self, guarded: str, position: int) -> Iterator[Segment]:
        text = guarded.replace(self._guard, "")
        if text:
            yield Segment(text, self._unguarded(position), is_control=False)

    def _read_places(self) -> list[tuple[int, int]] | None:
        """The (start, end) of every message's text, if it can be read off the rendered text."""
        if self._layout is None:
            return None
        return self._layout.places(self._text, [message["content"] for message in self._messages])

    def _content_end(self, index: int) -> int:
        """Return where the template's rendering changes if message ``index`` goes on longer."""
        if self._places is not None:
            return self._places[index][1]
        longer = list(self._messages)
        longer[index] = self._with(index, behind=self._probe)
        text = self._template.render(longer)
        if text == self._text:
            role = self._messages[index]["role"]
            raise self._template.fail(f"leaves out the text of message {index} ({role})")
        return _common_prefix(text, self._text)

    def _with(self, index: int, before: str = "", behind: str = "") -> dict[str, str]:
        message = self._messages[index]
        return {**message, "content": before + message["content"] + behind}

    def _broken_off(self, count: int, add_generation_prompt: bool = False) -> tuple[int, str]:
        """Return an offset, and how the conversation of the first ``count`` messages goes on there.

        Up to the offset it is this one.
        """
        ending = None
        if self._is_regular and self._layout is not None:
            ending = self._layout.ending(count)
        if ending is None or self._places is None:
            return 0, self._template.render(self._messages[:count], add_generation_prompt)
        at = self._places[count - 1][1] if count else 0
        return at, ending[not add_generation_prompt]

    def _common_from(self, at: int, text: str) -> int:
        """Return how many characters of ``text`` stand at an offset."""
        return _common_prefix(text, self._text[at : at + len(text)])

    def _unguarded(self, position: int) -> int:
        return position - bisect_left(self._guards, position)


def _alternatives(special_tokens: Mapping[str, int], text: str) -> str:
    """Return a regular expression for the control tokens in ``text``, the longest ones first."""
    present = sorted((name for name in special_tokens if name in text), key=len, reverse=True)
    if not present:
        return "(?!)"  # matches nowhere
    return f"(?:{'|'.join(map(re.escape, present))})"


def _unused_characters(text: str, count: int) -> list[str]:
    """Return `count` private-use characters that ``text`` does not contain; two if they are few."""
    used = set(text)
    unused = list(islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), count))
    if len(unused) < 2:
        raise UserError("a conversation uses every private-use character of Unicode's first plane")
    return unused


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
