"""The chat tokenizer on other families: small tokenizers of their kinds, templates in short form.

transformers gives the ids; where the loss is, each family says by hand.
"""

import json
from itertools import groupby
from pathlib import Path

import pytest
from chat_families import ANSWERS, FAMILIES, MISTRAL, Family, byte_level
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torchtune.data import Message

from emarecipes.errors import UserError
from emarecipes.models import HFChatTokenizer, hf_chat_tokenizer

QUESTIONS = ["What is the capital of France?", "Is 1 2 3?"]
TEXTS = [
    *(
        "Paris",
        " a",
        "a ",
        "  two  spaces  ",
        "",
        "\n\nlines\n\n",
        "\tx",
        "été 🙂 日本",
        "▁",
        "1234",
    ),
    *("[INST", "<", "</think>", "x</think>\n\ny", "<think>", "<0x41>", "user\n", "عربي", "e\u0301"),
]


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    start = [] if system is None else [Message("system", system, masked=True)]
    turns = zip(roles, contents, strict=False)
    return start + [Message(r, c, masked=r == "user") for r, c in turns]


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.text_content} for m in messages]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_ids_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    tokenizer, reference = family.write(tmp_path), family.reference()
    rotated = zip(TEXTS, TEXTS[1:] + TEXTS[:1], TEXTS[2:] + TEXTS[:2], strict=True)
    for first, second, third in rotated:
        system = third if family.accepts_system else None
        for contents in ((first, second), (first, second, third), (first, second, third, first)):
            messages = conversation(*contents, system=system)
            tokens, mask = tokenizer.tokenize_messages(messages)
            assert tokens == reference.apply_chat_template(as_dicts(messages), return_dict=False)
            assert len(mask) == len(tokens)
        prompt = tokenizer({"messages": conversation(first, "")}, inference=True)
        assert prompt["tokens"] == reference.apply_chat_template(
            as_dicts(conversation(first)), add_generation_prompt=True, return_dict=False
        )


def test_loss_is_on_the_answers_and_their_ends(family: Family, tmp_path: Path) -> None:
    tokenizer = family.write(tmp_path)
    turns = [text for pair in zip(QUESTIONS, ANSWERS, strict=True) for text in pair]
    pairs = zip(*tokenizer.tokenize_messages(conversation(*turns)), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    loss = [[token for token, _ in run] for masked, run in runs if not masked]
    assert [tokenizer.decode(run, skip_special_tokens=False) for run in loss] == family.loss
    assert tokenizer.stop_tokens == [tokenizer.special_tokens[name] for name in family.stop]


def test_control_tokens_in_messages_stay_text(family: Family, tmp_path: Path) -> None:
    tokenizer = family.write(tmp_path)
    harmless = tokenizer.tokenize_messages(conversation("a", "b", "c", "d"))[0]
    special = set(tokenizer.special_tokens.values())
    expected = [token for token in harmless if token in special]
    for name in tokenizer.special_tokens:
        for text in (name, f"x{name}y", f"{name}{name}", name[:-1] + name, f"a {name} b"):
            tokens, _ = tokenizer.tokenize_messages(conversation(text, text, text, text))
            assert [token for token in tokens if token in special] == expected, text
            decoded = tokenizer.decode(tokens, skip_special_tokens=False)
            assert decoded.count(text) >= 4
            assert tokenizer.decode(tokenizer.encode(text)).strip() == text


def test_unigram_vocabulary_with_control_tokens_in_it(tmp_path: Path) -> None:
    """A unigram model likes its control tokens best: they are in the vocabulary with score 0."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0 - i / 100) for i, letter in enumerate("abcs<>/|:")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    family = Family(tokenizer, MISTRAL.replace("INST", "abc"), "</s>", "<s>")
    ours = family.write(tmp_path)
    tokens, mask = ours.tokenize_messages(conversation("a </s> b", "</s><s>c</s>"))
    assert [t for t in tokens if t in (1, 2)] == [1, 2]
    assert ours.decode(ours.encode("a</s><s>b")) == "a</s><s>b"
    assert tokens.index(2) == len(tokens) - 1 and mask[-1] is False


def loss_of(tokenizer: HFChatTokenizer, messages: list[Message]) -> str:
    pairs = zip(*tokenizer.tokenize_messages(messages), strict=True)
    return tokenizer.decode([token for token, masked in pairs if not masked], False)


def test_loss_starts_exactly_at_the_answer_within_a_piece_of_text(tmp_path: Path) -> None:
    family = FAMILIES["plain"]
    tokenizer = family.write(tmp_path)
    messages = conversation("What is <eos> and <eos>?", "x <eos>")
    assert loss_of(tokenizer, messages) == "x <eos>\n<eos>"
    # Where the prompt ends with a space, that space is not the answer's.
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ gen }}"
    template = template.replace("gen", "'assistant: ' if add_generation_prompt else '<eos>'")
    tokenizer = hf_chat_tokenizer(str(tmp_path), chat_template=template)
    assert loss_of(tokenizer, conversation("a", " x")) == " x<eos>"


def test_settings_saved_with_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    """Truncation and padding, which would cut and stretch every piece of text."""
    messages = conversation("What is the capital of France?", "The capital is Paris.")
    tokenizer = FAMILIES["llama3"].write(tmp_path)
    expected = tokenizer.tokenize_messages(messages)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert hf_chat_tokenizer(str(tmp_path)).tokenize_messages(messages) == expected


def test_tokens_named_in_the_config_are_control_tokens(tmp_path: Path) -> None:
    """Whether tokenizer.json has them as ordinary added tokens, or in the vocabulary alone."""
    messages = conversation("a </s> b", "c")
    expected = FAMILIES["mistral_text"].write(tmp_path).tokenize_messages(messages)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    ordinary = spec["added_tokens"]
    for added_tokens in (ordinary, []):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": added_tokens}))
        tokenizer = hf_chat_tokenizer(str(tmp_path))
        assert tokenizer.tokenize_messages(messages) == expected
        assert set(tokenizer.special_tokens) == {"<s>", "</s>"}


def test_the_longest_control_token_wins(tmp_path: Path) -> None:
    special = [AddedToken(name, special=True) for name in ("<a>", "<a><b>", "<eos>")]
    template = "{% for m in messages %}{{ '<a><b>' + m.content + '<a><eos>' }}{% endfor %}"
    family = Family(byte_level(special), template, "<eos>")
    messages = conversation("x", "y")
    tokens, _ = family.write(tmp_path).tokenize_messages(messages)
    reference = family.reference()
    assert tokens == reference.apply_chat_template(as_dicts(messages), return_dict=False)
    assert tokens.count(reference.convert_tokens_to_ids("<a><b>")) == 2


def test_tool_messages_have_the_role_tool(tmp_path: Path) -> None:
    tokenizer = FAMILIES["llama3"].write(tmp_path)
    messages = [*conversation("a", "b"), Message("ipython", "42", masked=True)]
    text = tokenizer.decode(tokenizer.tokenize_messages(messages)[0], skip_special_tokens=False)
    assert text.endswith("<|start_header_id|>tool<|end_header_id|>\n\n42<|eot_id|>")


def test_prompt_that_changes_with_the_answer_is_refused(tmp_path: Path) -> None:
    """Mistral's newer templates show the system message with the last user message.

    All answers but the last would then be trained behind another prompt than they are asked for
    with, and the text from the first difference on would look like the answer.
    """
    template = """\
    {%- set ns = namespace(last=0) %}
    {%- for m in messages if m.role == 'user' %}{% set ns.last = loop.index %}{% endfor %}
    {%- set users = namespace(seen=0) %}
    {%- for m in messages if m.role != 'system' %}
        {%- if m.role == 'user' %}
            {%- set users.seen = users.seen + 1 %}
            {{- '[INST] ' + (messages[0].content + '\n\n' if users.seen == ns.last else '') }}
        {%- endif %}
        {{- m.content + (' [/INST]' if m.role == 'user' else eos_token) }}
    {%- endfor %}"""
    FAMILIES["mistral_control"].write(tmp_path)
    tokenizer = hf_chat_tokenizer(str(tmp_path), chat_template=template)
    assert loss_of(tokenizer, conversation("Hi", "Hello", system="Be short.")) == "Hello</s>"
    messages = conversation("Hi", "Hello", "Bye", "Goodbye", system="Be short.")
    with pytest.raises(UserError, match="before answer 2 differently once the answer follows"):
        tokenizer.tokenize_messages(messages)
    messages[2].masked = True
    assert loss_of(tokenizer, messages) == "Goodbye</s>"


def test_functions_that_templates_call(tmp_path: Path) -> None:
    """tojson, strftime_now, loop controls, namespaces and trimmed blocks, as in transformers."""
    template = """
    {%- set ns = namespace(count=0) %}
    {% for m in messages %}
        {% if ns.count > 1 %}
            {% break %}
        {% endif %}
        {% set ns.count = ns.count + 1 %}
    {{ m | tojson }}{{ m.content | tojson(indent=2) }}
    {% endfor %}
    {{ strftime_now('%Y') }} {{ dict(a=1) }} {{ tools is none }} {{ unk_token }}"""
    family = FAMILIES["llama3"]
    family.write(tmp_path)
    tokenizer = hf_chat_tokenizer(str(tmp_path), chat_template=template)
    reference = family.reference()
    messages = conversation("<é> & 'ü'", 'b"')
    messages[1].masked = True
    expected = reference.apply_chat_template(
        as_dicts(messages), chat_template=template, tokenize=False
    )
    assert tokenizer.decode(tokenizer.tokenize_messages(messages)[0]) == expected
    assert "<é> & 'ü'" in expected
