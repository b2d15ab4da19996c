"""What the chat tokenizer refuses, and where it looks for a chat template."""

import json
import shutil
from pathlib import Path

import pytest
from torchtune.data import Message

from emarecipes.errors import UserError
from emarecipes.models import hf_chat_tokenizer


def conversation(question: str, answer: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [Message("system", system, masked=True)]
    return [*start, Message("user", question, masked=True), Message("assistant", answer)]


def folder_with(tmp_path: Path, model_dir: Path, **changes: object) -> Path:
    """A copy of the model's tokenizer with changes to tokenizer_config.json (None deletes)."""
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    values = json.loads((model_dir / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    return tmp_path


def test_where_the_template_is_found(tmp_path: Path, model_dir: Path) -> None:
    def render(text: str) -> str:
        return "{% for m in messages %}{{ '" + text + "' + m.content }}{% endfor %}"

    def rendered(given: str | None = None) -> str:
        tokenizer = hf_chat_tokenizer(str(folder), chat_template=given)
        return tokenizer.decode(tokenizer.tokenize_messages([Message("user", "!", masked=True)])[0])

    named = [
        {"name": "tool_use", "template": render("T")},
        {"name": "default", "template": render("D")},
    ]
    folder = folder_with(tmp_path, model_dir, chat_template=named)
    assert rendered() == "D!"
    (folder / "chat_template.jinja").write_text(render("F"))
    assert rendered() == "F!"
    (folder / "own.jinja").write_text(render("O"))
    assert rendered(str(folder / "own.jinja")) == "O!"
    assert rendered(render("G")) == "G!"


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"chat_template": None}, None, "no chat template"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, None, "rag and none named default"),
        ({}, "{% for %}", "not a valid chat template"),
        ({}, "missing.jinja", "cannot read missing.jinja"),
        ({"eos_token": "<nope>"}, None, "eos_token is '<nope>'"),
    ],
)
def test_unusable_folders(
    changes: dict[str, object], given: str | None, message: str, tmp_path: Path, model_dir: Path
) -> None:
    folder = folder_with(tmp_path, model_dir, **changes)
    with pytest.raises(UserError, match=message):
        hf_chat_tokenizer(str(folder), chat_template=given)


def test_missing_and_broken_files(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        hf_chat_tokenizer(str(tmp_path))
    folder_with(tmp_path, model_dir)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        hf_chat_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    folder_with_config = tmp_path / "tokenizer_config.json"
    folder_with_config.write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        hf_chat_tokenizer(str(tmp_path))


def test_conversations_that_cannot_be_rendered(model_dir: Path) -> None:
    def tokenize(template: str, messages: list[Message]) -> None:
        hf_chat_tokenizer(str(model_dir), chat_template=template).tokenize_messages(messages)

    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    with pytest.raises(UserError, match="No system!"):
        tokenize(refuses + "{{ messages[-1].content }}", conversation("a", "b", system="c"))
    with pytest.raises(UserError, match="leaves out the text of message 1"):
        tokenize("{{ messages[0].content }}", conversation("a", "b"))
    image = [{"type": "text", "content": "a"}, {"type": "image", "content": "pixels"}]
    with pytest.raises(UserError, match=r"user message .* type image; only text"):
        tokenize("{{ messages[0].content }}", [Message("user", image, masked=True)])
    with pytest.raises(UserError, match=r"half of a surrogate pair \('\\ud83d'\)"):
        tokenize("{{ messages[0].content }}", conversation("cut off: \ud83d", "b"))
