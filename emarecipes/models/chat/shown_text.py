"""Whether a chat template shows every message whole.

A template is a program. Phi-3's leaves system turns out, R1's takes the thinking out of answers:
what is trained, asked or scored is then another conversation than the one that was given. Marks in
the messages' texts, private-use characters that come out where the texts do, show it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from emarecipes.errors import UserError
from emarecipes.models.chat.layout import json_texts
from emarecipes.models.chat.template import ChatTemplate

_THINKING = re.compile(r"\s*(</?think>)\s*")
_END_OF_THINKING = "</think>"


def check_shown(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool,
    text: str,
    *,
    guard: str,
    marks: Sequence[str],
) -> None:
    """Check that the text of every message stands in a rendered conversation.

    Whitespace at a text's ends, and around the tags of its thinking, is the template's affair, and
    it may write texts as JSON strings. It may leave out the thinking of answers before the last
    question, as it will in use: a line says so, once a template.

    Args:
        template: What rendered it.
        messages: Each with ``role`` and ``content``.
        add_generation_prompt: Whether it ends with a generation prompt.
        text: What was rendered.
        guard: A character in messages and text that does not count.
        marks: Characters that no message has; two a message and one more, or one alone.

    Raises:
        UserError: The template leaves out a message, or a part of one, or changes it.
    """
    contents = [message["content"] for message in messages]

    def read(marked: Mapping[int, str], used: Sequence[str]) -> dict[str, int] | None:
        changed = [
            {**message, "content": marked.get(index, message["content"])}
            for index, message in enumerate(messages)
        ]
        try:
            return _read_marks(template.render(changed, add_generation_prompt), text, used)
        except UserError:  # The template does not take the mark.
            return None

    mark, *others = marks
    ends = dict(enumerate(zip(others[::2], others[1::2], strict=False)))
    found: dict[str, int] = {}
    if len(ends) >= len(messages):
        ends = {index: ends[index] for index in range(len(messages))}
        marked = {i: _marked(contents[i], start, "", end) for i, (start, end) in ends.items()}
        found = read(marked, others) or {}
    thinking_left_out = False
    for index, content in enumerate(contents):
        if not content.strip():
            continue
        own = ends.get(index, ())
        places = [found[one] for one in own if one in found]
        if len(places) == 2:
            part = text[places[0] : places[1]]
        else:
            around = [at for one, at in found.items() if one not in own]
            alone: list[dict[str, int] | None] = [{mark: at} for at in places]
            alone = alone or [read({index: one}, [mark]) for one in _marked_anywhere(content, mark)]
            part = _part(alone, text, around)
        role = messages[index]["role"]
        if not part:
            raise template.fail(f"leaves out the text of message {index} ({role}); {_remedy(role)}")
        if _is_whole(content, part, guard):
            continue
        asked_again = any(message["role"] == "user" for message in messages[index + 1 :])
        if role == "assistant" and asked_again and _is_whole_answer(content, part, guard):
            thinking_left_out = True
            continue
        raise template.fail(
            f"changes, or leaves out a part of, the text of message {index} ({role}); "
            f"{_remedy(role)}"
        )
    if thinking_left_out:
        template.warn_once(
            "leaves out the thinking of answers before the last question, as it does in use; where "
            "such an answer is trained on, that is what stands behind its thinking"
        )


def _remedy(role: str) -> str:
    turn = "leave the system turn out, or " if role == "system" else ""
    return f"{turn}pass a chat_template that shows it as it is"


def _part(readings: Sequence[dict[str, int] | None], text: str, around: Sequence[int]) -> str:
    """Return the part of the text that a message's is in; "" if none of it is shown."""
    places = [at for found in readings if found is not None for at in found.values()]
    if not places:
        # Where the template looks into its texts, or cuts them, a mark changes what it does, and
        # one that is not there says nothing.
        return text if None in readings else ""
    start = max((at for at in around if at <= min(places)), default=0)
    end = min((at for at in around if at >= max(places)), default=len(text))
    return text[start:end]


def _marked_anywhere(content: str, mark: str) -> list[str]:
    return [_marked(content, *where) for where in ((mark, "", ""), ("", mark, ""), ("", "", mark))]


def _marked(content: str, start: str, middle: str, end: str) -> str:
    """Return a text with marks in it, at its ends within the whitespace that is around it."""
    core = content.strip()
    before, behind = content.split(core, 1) if core else ("", content)
    half = len(core) // 2
    return f"{before}{start}{core[:half]}{middle}{core[half:]}{end}{behind}"


def _read_marks(marked: str, text: str, marks: Sequence[str]) -> dict[str, int] | None:
    """Return where marks first stand in a text; None if it is another text without them."""
    pattern = re.compile(f"[{''.join(marks)}]")
    if pattern.sub("", marked) != text:
        return None
    found: dict[str, int] = {}
    for number, match in enumerate(pattern.finditer(marked)):
        found.setdefault(match.group(), match.start() - number)
    return found


def _is_whole(content: str, part: str, guard: str) -> bool:
    content, part = (value.replace(guard, "").strip() for value in (content, part))
    if any(form in part for form in (content, *json_texts(content))):
        return True
    content, part = (_THINKING.sub(r"\1", value) for value in (content, part))
    return content in part


def _is_whole_answer(content: str, part: str, guard: str) -> bool:
    """Whether all is there but the thinking that the answer begins with."""
    thinking, end, answer = content.replace(guard, "").strip().partition(_END_OF_THINKING)
    only_thinking = bool(end) and "<think>" not in thinking.removeprefix("<think>")
    return only_thinking and _is_whole(answer, part, guard)
