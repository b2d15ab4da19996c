"""The chat tokenizer on the prepared SmolLM2 (ChatML with a default system message)."""

import json
import pickle
import random
from itertools import groupby
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from torchtune import config
from torchtune.data import InputOutputToMessages, Message
from torchtune.datasets import SFTDataset
from transformers import AutoTokenizer

from emarecipes.errors import UserError
from emarecipes.models import HFChatTokenizer, hf_chat_tokenizer

IM_START, IM_END = 1, 2
# fmt: off
PIECES = [
    "Hello", "world", "don't", "ANTI-establishment", "naïve", "3.14159", "2024-02-29", "007",
    "def f(x):\n\treturn x**2  # ²", "{'a': [1, 2]}", "<b>&amp;</b>", "$E=mc^2$", "a_b__c",
    "日本語の文章", "你好,世界", "한국어", "ไทย", "हिन्दी में", "العربية من اليمين", "עברית שָׁלוֹם",
    "🙂", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "e\u0301\u0327", "Z̷a̸l̵g̶o̴", "\u200b", "\u2028", "\ufeff",
    "\U0001d518", "\ue000", "\ue001\ue002", "\uf8ff", "\x00", "\x7f", "ﬁ", "①", "½", "١٢٣",
    "\u00a0", "\u3000",
    "system", "assistant\n", "user:", "<|", "|>", "<|im_", "[INST]", "</s>", "{{ x }}", "{% if %}",
]
SPECIAL_PIECES = [
    "<|im_end|>", "<|im_start|>", "<|im_start|>system\n", "<|endoftext|>", "<file_sep>",
]
# fmt: on
SEPARATORS = ["", "", " ", "  ", "\n", "\n\n", "\t", "\r\n"]


def texts(count: int, seed: int, pieces: list[str] = PIECES) -> list[str]:
    generator = random.Random(seed)
    return [
        "".join(
            generator.choice(pieces) + generator.choice(SEPARATORS)
            for _ in range(generator.randint(1, 8))
        )
        for _ in range(count)
    ]


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, the user masked."""
    start = [] if system is None else [Message(role="system", content=system, masked=True)]
    roles = ["user", "assistant"] * len(contents)
    turns = [Message(r, c, masked=r == "user") for r, c in zip(roles, contents, strict=False)]
    return start + turns


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.text_content} for m in messages]


def labelled(tokenizer: HFChatTokenizer, messages: list[Message]) -> list[str]:
    """The stretches of text with loss."""
    pairs = zip(*tokenizer.tokenize_messages(messages), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [
        tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        for masked, run in runs
        if not masked
    ]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> HFChatTokenizer:
    return hf_chat_tokenizer(str(model_dir))


@pytest.fixture(scope="module")
def transformers_tokenizer(model_dir: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(model_dir)


# Token ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as llama.cpp and transformers give them with the released SmolLM2 tokenizer
        ("Hello world", [19556, 905]),
        ("<|im_start|>", [44, 108, 306, 79, 3738, 108, 46]),
        ("  leading spaces", [216, 2899, 5600]),
        ("Write a haiku about the ocean.\n", [19161, 253, 421, 30614, 563, 260, 5065, 30, 198]),
        ("", []),
    ],
)
def test_published_ids(text: str, ids: list[int], tokenizer: HFChatTokenizer) -> None:
    assert tokenizer.encode(text) == ids


def test_published_ids_of_a_chat(tokenizer: HFChatTokenizer) -> None:
    question = "Quelle est la capitale de la France ? Réponds en une phrase."
    # fmt: off
    ids = [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 65, 2726, 290, 1264, 2618, 47765, 1121, 367, 2618,
        4649, 9148, 428, 2756, 96, 19870, 430, 16520, 8715, 30, 2, 198, 1, 520, 9531, 198,
    ]
    # fmt: on
    sample = {"messages": [Message("user", question), Message("assistant", "")], "source": "a.csv"}
    prompt = tokenizer(sample, inference=True)
    assert prompt == {"tokens": ids, "mask": [False] * len(ids), "source": "a.csv"}
    sample["messages"].pop()
    assert tokenizer(sample, inference=True)["tokens"] == ids


def test_digits_are_split_one_by_one(tokenizer: HFChatTokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 2024")] == ["in", " ", *"2024"]


def test_plain_text_ids_are_those_of_the_tokenizers_library(
    tokenizer: HFChatTokenizer, model_dir: Path
) -> None:
    reference = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for text in texts(200, seed=0):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [IM_START, 81, IM_END]


def test_chat_ids_are_those_of_transformers(
    tokenizer: HFChatTokenizer, transformers_tokenizer: AutoTokenizer
) -> None:
    generator = random.Random(1)
    for text in texts(200, seed=1):
        others = texts(generator.randint(1, 3), seed=generator.randint(0, 10**6))
        messages = chat(text, *others, system=generator.choice([None, "", text[::-1]]))
        expected = transformers_tokenizer.apply_chat_template(as_dicts(messages), return_dict=False)
        assert tokenizer.tokenize_messages(messages)[0] == expected
        prompt, mask = tokenizer.tokenize_messages(messages, add_end_tokens=False)
        if messages[-1].role == "user":
            assert prompt == transformers_tokenizer.apply_chat_template(
                as_dicts(messages), add_generation_prompt=True, return_dict=False
            )
        else:  # an answer begun is left open
            assert prompt == expected[:-2] and expected[-2] == IM_END
        assert mask == [False] * len(prompt)


def test_control_tokens_in_messages_stay_text(tokenizer: HFChatTokenizer) -> None:
    for text in texts(200, seed=2, pieces=[*SPECIAL_PIECES * 5, *PIECES]):
        text = text.strip()
        messages = chat(text, text, system=text)
        tokens, _ = tokenizer.tokenize_messages(messages)
        assert [t for t in tokens if t in tokenizer.special_tokens.values()] == [
            IM_START,
            IM_END,
        ] * 3
        rendered = "".join(f"<|im_start|>{m.role}\n{text}<|im_end|>\n" for m in messages)
        assert tokenizer.decode(tokens, skip_special_tokens=False) == rendered
        assert tokenizer.decode(tokenizer.encode(text)) == text


# What carries the loss


def test_loss_is_on_the_answer_and_its_end(tokenizer: HFChatTokenizer) -> None:
    assert labelled(tokenizer, chat("Hi", "Hello!")) == ["Hello!<|im_end|>"]
    assert labelled(tokenizer, chat("Hi", "Hello!", system="Be short.")) == ["Hello!<|im_end|>"]
    turns = chat("1", "one", "2", "two", "3", "<|im_end|> three")
    assert labelled(tokenizer, turns) == [
        "one<|im_end|>",
        "two<|im_end|>",
        "<|im_end|> three<|im_end|>",
    ]
    turns[1].masked = True  # torchtune's train_on_last
    assert labelled(tokenizer, turns)[0] == "two<|im_end|>"
    assert labelled(tokenizer, chat("no answer yet")) == []


@pytest.mark.parametrize(
    "answer", ["", "🙂", "🙂🙂\n", " leading", "trailing \n ", "١٢", "assistant\n"]
)
def test_loss_on_unusual_answers(answer: str, tokenizer: HFChatTokenizer) -> None:
    assert labelled(tokenizer, chat("Hi", answer)) == [f"{answer}<|im_end|>"]


def test_a_token_across_the_start_is_prompt(tokenizer: HFChatTokenizer) -> None:
    # The header's newline and the answer's first become one token, "\n\n".
    assert labelled(tokenizer, chat("Hi", "\n\nHello")) == ["\nHello<|im_end|>"]
    assert labelled(tokenizer, chat("Hi", " ")) == ["<|im_end|>"]


def test_loss_against_a_scan_of_the_ids(tokenizer: HFChatTokenizer) -> None:
    """In ChatML answers can be found in the ids, for no message can contain a control token."""
    header = [IM_START, *tokenizer.encode("assistant\n")]
    all_texts = [text.strip() for text in texts(400, seed=3, pieces=[*PIECES, *SPECIAL_PIECES])]
    for question, answer in zip(all_texts[::2], all_texts[1::2], strict=True):
        tokens, mask = tokenizer.tokenize_messages(chat(question, answer, question, answer))
        expected, inside = [], False
        for position, token in enumerate(tokens):
            inside = inside or tokens[max(0, position - len(header)) : position] == header
            expected.append(not inside)
            inside = inside and token != IM_END
        assert mask == expected


def test_truncation_is_a_plain_cut(tokenizer: HFChatTokenizer, model_dir: Path) -> None:
    messages = chat("What is it?", "It is a long answer, with words.")
    tokens, mask = tokenizer.tokenize_messages(messages)
    short = hf_chat_tokenizer(str(model_dir), max_seq_len=5)
    assert short.tokenize_messages(messages) == (tokens[:5], mask[:5])
    for length in range(1, len(tokens) + 3):
        short.max_seq_len = length
        assert short.tokenize_messages(messages) == (tokens[:length], mask[:length])


def test_train_on_input(tokenizer: HFChatTokenizer) -> None:
    messages = [Message("user", "Hi"), Message("assistant", "Hello!")]
    tokens, mask = tokenizer.tokenize_messages(messages)
    assert mask == [False] * len(tokens)
    # torchtune masks the system message that a config adds.
    messages.insert(0, Message("system", "Be short.", masked=True))
    assert labelled(tokenizer, messages) == [
        "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    ]


@pytest.mark.parametrize("roles", [["user"], ["system", "assistant"], ["ipython"]])
def test_loss_on_some_other_messages_is_refused(
    roles: list[str], tokenizer: HFChatTokenizer
) -> None:
    order = ["system", "user", "assistant", "ipython", "assistant"]
    messages = [Message(role, "x", masked=role not in roles, eot=True) for role in order]
    with pytest.raises(UserError, match="only assistant messages, or with train_on_input"):
        tokenizer.tokenize_messages(messages)


# In torchtune


def test_in_a_torchtune_dataset(model_dir: Path, tmp_path: Path) -> None:
    component = {"_component_": "emarecipes.models.hf_chat_tokenizer", "max_seq_len": 2048}
    path = str(model_dir / "tokenizer.json")
    tokenizer = config.instantiate(OmegaConf.create({**component, "path": path}))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (IM_END, IM_START, IM_END)
    assert (tokenizer.stop_tokens, tokenizer.vocab_size) == ([IM_END], 49152)
    (tmp_path / "a.json").write_text(json.dumps([{"input": "Hi", "output": "Hello!"}]))
    dataset = SFTDataset(
        source="json",
        data_files=str(tmp_path / "a.json"),
        split="train",
        message_transform=InputOutputToMessages(new_system_prompt="Be short."),
        model_transform=tokenizer,
    )
    labels = [label for label in dataset[0]["labels"] if label != -100]
    assert labels == [*tokenizer.encode("Hello!"), IM_END]


def test_a_pickled_tokenizer_is_the_same(model_dir: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    tokenizer = hf_chat_tokenizer(str(model_dir), max_seq_len=12, chat_template=template)
    copy = pickle.loads(pickle.dumps(tokenizer))
    messages = chat("<|im_end|>", "<|im_start|> and more words than twelve tokens")
    assert copy.tokenize_messages(messages) == tokenizer.tokenize_messages(messages)
