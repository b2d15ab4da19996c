"""Training's tokens and labels, with template arguments, against transformers: 50 conversations of
each template; a prompt for sampling is what an answer is trained behind."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torchtune.data import Message
from wild_templates import WILD, Wild

from emarecipes.errors import UserError
from emarecipes.models import HFChatTokenizer, hf_chat_tokenizer
from emarecipes.models.adapters.trained_with import warn_of_another_form

WORDS = ["the capital", "of France ", "is", "Paris.", "\n\n", " ", "1 2 3", "été 🙂", "[INS"]
WORDS += ["<|im_end|", "- a\n- b", "日本", "user", "\tx", "'s", "A:", "e\u0301", "</s", "<"]


def conversations(system: bool) -> list[list[dict[str, str]]]:
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(WORDS, k=draw.randint(1, 8))) + draw.choice(["", ".", "\n"])

    found = []
    for number in range(50):
        roles = ["user", "assistant"] * draw.randint(1, 3)
        if system and number % 2:
            roles.insert(0, "system")
        found.append([{"role": role, "content": f"{text()}q"} for role in roles])
    return found


def messages(chat: list[dict[str, str]], *, trained: list[int] | None = None) -> list[Message]:
    """torchtune's; only the answers at these places have a loss, by default all."""
    return [
        Message(
            m["role"],
            m["content"],
            masked=m["role"] != "assistant" or (trained is not None and i not in trained),
        )
        for i, m in enumerate(chat)
    ]


@pytest.fixture(params=WILD)
def wild(request: pytest.FixtureRequest) -> Wild:
    return WILD[request.param]


@pytest.fixture
def tokenizer(wild: Wild, tmp_path: Path) -> HFChatTokenizer:
    wild.family.write(tmp_path)
    arguments = OmegaConf.create(wild.arguments) if wild.arguments else None
    return hf_chat_tokenizer(str(tmp_path), template_arguments=arguments)


def test_what_is_trained_and_asked_is_what_transformers_makes_of_it(
    wild: Wild, tokenizer: HFChatTokenizer
) -> None:
    reference = wild.family.reference()
    marked = "{% generation" in wild.family.template or "{%- generation" in wild.family.template
    for chat in conversations(wild.system):
        last = len(chat) - 1
        tokens, mask = tokenizer.tokenize_messages(messages(chat, trained=[last]))
        assert tokens == reference.apply_chat_template(chat, return_dict=False, **wild.arguments)
        asked = [*messages(chat[:-1]), Message("assistant", "")]
        prompt = tokenizer({"messages": asked}, inference=True)["tokens"]
        assert prompt == reference.apply_chat_template(
            chat[:-1], add_generation_prompt=True, return_dict=False, **wild.arguments
        )
        if marked:
            theirs = reference.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True, **wild.arguments
            )
            _, all_answers = tokenizer.tokenize_messages(messages(chat))
            assert [not masked for masked in all_answers] == list(
                map(bool, theirs["assistant_masks"])
            )
            continue
        trained = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
        answer = tokenizer.decode(trained, skip_special_tokens=False)
        content = chat[-1]["content"]
        assert answer.lstrip().startswith((wild.opening + content.lstrip("\n")).lstrip())
        if "<think>\n" not in tokenizer.decode(prompt[-3:], False) or wild.arguments:
            assert tokens[: len(prompt)] == prompt, "trained behind what sampling asks with"
            assert all(mask[: len(prompt)]) and not any(mask[len(prompt) : -2])


def thinking(folder: Path, **arguments: Any) -> HFChatTokenizer:
    WILD["qwen 3"].family.write(folder)
    return hf_chat_tokenizer(str(folder), template_arguments=arguments)


def test_an_argument_that_the_template_never_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        thinking(tmp_path, enable_thinkin=False)
    assert "template_arguments.enable_thinkin has no effect" in str(error.value)
    assert "(did you mean enable_thinking?); it reads enable_thinking" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="gets it from the conversation or the tokenizer"):
        thinking(tmp_path, messages=[])
    with pytest.raises(UserError, match="must be a mapping such as"):
        hf_chat_tokenizer(str(tmp_path), template_arguments=["enable_thinking"])


def test_an_earlier_answer_behind_another_prompt_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{"role": r, "content": r} for r in ("user", "assistant") * 2]
    tokenizer = thinking(tmp_path, enable_thinking=False)
    with caplog.at_level(logging.WARNING):
        tokenizer.tokenize_messages(messages(chat, trained=[3]))
        assert not caplog.records
        for _ in range(2):
            tokenizer.tokenize_messages(messages(chat))
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert "asks for an answer with '<think>\\n\\n</think>\\n\\n' and shows message 1" in told


def test_an_answer_that_is_not_marked_is_refused(tmp_path: Path) -> None:
    WILD["bare"].family.write(tmp_path)
    template = WILD["bare"].family.template.replace(
        "'assistant' %}", "'assistant' and loop.last %}"
    )
    tokenizer = hf_chat_tokenizer(str(tmp_path), chat_template=template)
    chat = [{"role": r, "content": r} for r in ("user", "assistant") * 2]
    tokenizer.tokenize_messages(messages(chat, trained=[3]))
    with pytest.raises(UserError, match="generation tags, and not answer 1: nothing of it"):
        tokenizer.tokenize_messages(messages(chat))


def test_an_adapter_asked_with_other_arguments_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"_component_": "emarecipes.models.hf_chat_tokenizer", "path": "m"}
    trained = {**entry, "template_arguments": {"enable_thinking": False}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"tokenizer": trained}))
    warn_of_another_form(tmp_path / "adapter", OmegaConf.create(trained), "here")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_another_form(tmp_path / "adapter", OmegaConf.create(entry), "here")
    assert 'tokenizer.template_arguments {"enable_thinking": false}, and is' in caplog.text
