"""The form in which a run was trained goes with its weights, and another one is told."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from emarecipes.training.conversation_form import warn_of_another_form
from emarecipes.training.weights import tokenizer_files

OURS = "emarecipes.models.hf_chat_tokenizer"
NAMES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def test_what_of_a_tokenizer_a_merged_folder_takes(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, names in ((base, [*NAMES, "chat_template.jinja"]), (other, ["tokenizer.json"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f"{folder.name} {name}")

    def files(**entry: Any) -> dict[str, bytes | None]:
        return tokenizer_files(OmegaConf.create({"_component_": OURS, **entry}), base)

    assert files(path=str(base)) == files(path=str(base / "tokenizer.json")) == {}
    given = files(path=str(base), chat_template="{{ messages }}")
    assert given == {"chat_template.jinja": b"{{ messages }}"}
    (tmp_path / "a.jinja").write_text("{{ 1 }}")
    assert files(path=str(base), chat_template=str(tmp_path / "a.jinja")) == {
        "chat_template.jinja": b"{{ 1 }}"
    }
    # The base's own template must not lie beside another folder's tokenizer.
    nothing = dict.fromkeys([*NAMES, "chat_template.jinja"])
    assert files(path=str(other)) == nothing | {"tokenizer.json": b"other tokenizer.json"}


def test_an_adapter_that_is_asked_in_another_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(trained: dict[str, Any], asked: dict[str, Any]) -> str:
        caplog.clear()
        config = OmegaConf.create({"tokenizer": {"_component_": OURS} | trained})
        OmegaConf.save(config, tmp_path / "config.yaml")
        entry = OmegaConf.create({"_component_": OURS} | asked)
        warn_of_another_form(tmp_path / "adapter", entry, "adapter")
        return caplog.text

    (tmp_path / "a.jinja").write_text("{{ 1 }}")
    assert told({}, {}) == told({"chat_template": "{{ 1 }}"}, {"chat_template": "{{ 1 }}"}) == ""
    assert told({"chat_template": "{{ 1 }}"}, {"chat_template": str(tmp_path / "a.jinja")}) == ""
    assert told({"max_seq_len": 9}, {"path": "elsewhere"}) == ""
    assert "tokenizer.chat_template {{ 1 }}, and is asked here with the folder's own" in told(
        {"chat_template": "{{ 1 }}"}, {}
    )
    assert "tokenizer._component_ " in told({"_component_": "torchtune.models.x"}, {})
    (tmp_path / "config.yaml").unlink()
    caplog.clear()
    warn_of_another_form(tmp_path / "adapter", OmegaConf.create({}), "adapter")
    assert caplog.text == ""
