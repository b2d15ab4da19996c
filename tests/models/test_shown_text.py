"""Every message is shown whole by the chat template, or the row is refused; in linear time.

The templates are short forms of what Phi-3, DeepSeek R1 and Qwen3 ship.
"""

import random
from itertools import cycle, islice
from pathlib import Path

import pytest
from chat_families import FAMILIES, QWEN_3
from torchtune.data import Message

from emarecipes.errors import UserError
from emarecipes.models import HFChatTokenizer, hf_chat_tokenizer
from emarecipes.models.chat import conversation as _conversation
from emarecipes.models.chat.template import ChatTemplate

TURN = "'<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n'"


def template(content: str, condition: str = "true") -> str:
    turn = TURN.replace("CONTENT", content)
    return f"{{% for m in messages if {condition} %}}{{{{ {turn} }}}}{{% endfor %}}"


NO_SYSTEM = template("m.content", "m.role != 'system'")
NO_THINKING = template("m.content.split('</think>')[-1]")
# As Qwen3's for the answer that comes last: it parses the thinking, and writes it its own way.
OWN_THINKING = template(
    "('<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') + "
    "'\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n')"
    " if '</think>' in m.content else m.content)"
)
THOUGHT = "<think>\nTwo.\n</think>\n\nIt is 2."
COMPACT = "<think>Two.</think>It is 2."


def chat(*contents: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [Message("system", system, masked=True)]
    turns = zip(cycle(["user", "assistant"]), contents, strict=False)
    return start + [Message(role, text, masked=role == "user") for role, text in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    FAMILIES["qwen3"].write(folder)
    return folder


def loss_of(tokenizer: HFChatTokenizer, messages: list[Message]) -> str:
    pairs = zip(*tokenizer.tokenize_messages(messages), strict=True)
    return tokenizer.decode([token for token, masked in pairs if not masked], False)


@pytest.mark.parametrize(
    ("chat_template", "messages", "message"),
    [
        (NO_SYSTEM, chat("1+1?", "2", system="user"), r"leaves out the text of message 0 \(sys"),
        (NO_THINKING, chat("1+1?", THOUGHT), r"a part of, the text of message 1 \(assistant\)"),
        (NO_THINKING, chat("1+1?", "a", "b?", COMPACT), "a part of, the text of message 3"),
        (NO_THINKING, chat(THOUGHT, "2"), r"a part of, the text of message 0 \(user\)"),
        # Not only thinking goes.
        (NO_THINKING, chat("1+1?", f"Well. {THOUGHT}", "b?", "c"), "a part of, the text of mess"),
        (NO_THINKING, chat("1+1?", f"{THOUGHT}{THOUGHT}", "b?", "c"), "a part of, the text of mes"),
        (OWN_THINKING, chat("1+1?", f"Well. {THOUGHT}"), "a part of, the text of message 1"),
        (template("m.content[:8]"), chat("Is 1 2?", "It is one."), "a part of, the text of messa"),
        (template("m.content | upper"), chat("A", "it is"), "changes, or leaves out a part of"),
        (
            template("m.content", "'bot' not in m.content"),
            chat("A bot", "Yes"),
            "leaves out the text of message 0",
        ),
        (template("m.content | replace('a b', 'a')"), chat("a b", "Yes"), "changes, or leav"),
    ],
)
def test_text_that_is_not_shown_is_refused(
    chat_template: str, messages: list[Message], message: str, folder: Path
) -> None:
    (folder / "own.jinja").write_text(chat_template)
    tokenizer = hf_chat_tokenizer(str(folder), chat_template=str(folder / "own.jinja"))
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.tokenize_messages(messages)
    assert str(caught.value).startswith(str(folder / "own.jinja"))
    assert "pass a chat_template that shows it" in str(caught.value)
    with pytest.raises(UserError, match=message):  # In a prompt as well.
        tokenizer({"messages": messages}, inference=True)


@pytest.mark.parametrize(
    ("chat_template", "messages", "loss"),
    [
        (NO_SYSTEM, chat("1+1?", "2", system=""), "2<|im_end|>"),
        (NO_SYSTEM, chat("1+1?", "2", system="\n"), "2<|im_end|>"),
        (NO_THINKING, chat("1+1?", "2"), "2<|im_end|>"),
        (OWN_THINKING, chat("1+1?", THOUGHT), f"{THOUGHT}<|im_end|>"),
        (OWN_THINKING, chat("1+1?", COMPACT), f"{THOUGHT}<|im_end|>"),
        (template("m.content | trim"), chat("1+1?", "\n 2\n"), "2<|im_end|>"),
        (template("m.content | tojson"), chat("1+1?", 'a\n"2"'), '"a\\n\\"2\\""<|im_end|>'),
        (template("m.content | tojson(ensure_ascii=true)"), chat("1?", "é"), '"\\u00e9"<|im_end|>'),
        (template("m.content[:8]"), chat("1+1?", "2 it is."), "2 it is.<|im_end|>"),
        (QWEN_3, chat("1+1?", COMPACT), f"{COMPACT}<|im_end|>"),
    ],
)
def test_text_that_is_shown_in_another_way(
    chat_template: str, messages: list[Message], loss: str, folder: Path
) -> None:
    tokenizer = hf_chat_tokenizer(str(folder), chat_template=chat_template)
    header = "<|im_start|>assistant\n"  # Without a generation prompt it is the model's to write.
    assert loss_of(tokenizer, messages).strip().removeprefix(header) == loss


def test_thinking_that_goes_from_earlier_answers_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = hf_chat_tokenizer(str(folder), chat_template=QWEN_3)
    for _ in range(3):
        messages = chat("1+1?", THOUGHT, "2+2?", "4")
        assert loss_of(tokenizer, messages) == (
            "It is 2.<|im_end|><think>\n\n</think>\n\n4<|im_end|>"
        )
        tokenizer({"messages": messages[:-1]}, inference=True)
    (line,) = caplog.messages
    assert line.startswith("chat_template: the chat template leaves out the thinking of answers")
    caplog.clear()
    loss_of(hf_chat_tokenizer(str(folder), chat_template=QWEN_3), chat("1+1?", THOUGHT))
    assert caplog.messages == []


TEXTS = [
    "Paris",
    " a",
    "a \n",
    "",
    "\n\nlines\n\n",
    "été 🙂",
    "x</think>\n\ny",
    "<think>",
    "\ue000",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_those_of_the_slow_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which renders the conversation again for every answer, broken off before and behind it."""
    family = FAMILIES[name]
    family.write(tmp_path)
    generator = random.Random(name)
    texts = [*TEXTS, *(f"x{token}" for token in family.write(tmp_path).special_tokens)]
    rows = []
    for length in (1, 2, 3, 4, 5, 6, 33, 40):
        for pool in (TEXTS[:3], TEXTS[:6], texts):
            system = generator.choice(pool) if family.accepts_system else None
            k = min(length, 8) if pool is texts else length
            rows.append(chat(*generator.choices(pool, k=k), system=system))
    found = []
    for slow in (False, True):
        with monkeypatch.context() as patch:
            if slow:
                patch.setattr(_conversation, "find_layout", lambda *_: None)
            tokenizer = hf_chat_tokenizer(str(tmp_path))
            found.append([tokenizer.tokenize_messages(row) for row in rows])
    assert found[0] == found[1]


def test_rendering_is_linear_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["llama3"].write(tmp_path)
    rendered: list[int] = []
    render = ChatTemplate.render

    def counted(self: ChatTemplate, messages: list[dict[str, str]], prompt: bool = False) -> str:
        rendered.append(len(messages))
        return render(self, messages, prompt)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    first = chat(*islice(cycle(["Is 1 2?", "Yes, 2."]), 400))
    _, mask = tokenizer.tokenize_messages(first)
    assert mask.count(False) == 200 * len([*tokenizer.encode("Yes, 2."), tokenizer.eos_id])
    assert sum(rendered) < 16 * 400  # Twice 200 x 200 and more, if every prompt were rendered.
    rendered.clear()
    tokenizer.tokenize_messages(chat(*islice(cycle(["Is it?", "No."]), 400)))
    assert rendered == [400]
