"""What a run was trained with goes with its weights, and what differs from it is told."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.evaluation.checked import check_sampled_from
from emarecipes.fingerprint import adapter_digest
from emarecipes.models.adapters.trained_with import (
    check_same_base,
    warn_of_another_base,
    warn_of_another_form,
)
from emarecipes.training.weights import tokenizer_files

OURS = "emarecipes.models.hf_chat_tokenizer"
WITHOUT = r"c.yaml: answers.reference: .*a.jsonl was sampled from an adapter, and reference is the "
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


def test_an_adapter_that_is_put_on_another_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(folder: str, value: float) -> Path:
        (tmp_path / folder).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / folder / "model.safetensors")
        return tmp_path / folder

    base, copy, tuned = write("base", 0.0), write("copy", 0.0), write("tuned", 1.0)
    save_file({"w": torch.zeros(4)}, tmp_path / "adapter_model.safetensors")

    def told(named: Any) -> str:
        caplog.clear()
        stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": named}
        (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
        warn_of_another_base(tmp_path, base, "adapter")
        return caplog.text

    assert [told(name) for name in (str(base), str(copy), "org/Base", None)] == [""] * 4
    for name in (str(tuned), "org/Base-Instruct"):
        assert f"was trained on {name}, and is put on {base} here" in told(name)


def test_what_is_added_in_training_is_of_the_same_base(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("copy", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    save_file({"w": torch.zeros(4)}, tmp_path / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    for name in (str(tmp_path / "copy"), "org/other", None, str(tmp_path / "tuned")):
        config = stated | {"base_model_name_or_path": name}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        tuned = str(name).endswith("tuned")
        with pytest.raises(UserError, match="are not those of") if tuned else nullcontext():
            check_same_base(tmp_path, tmp_path / "base")


def test_answers_that_were_sampled_from_another_adapter(tmp_path: Path) -> None:
    """As after a run was trained again in its folder, with the answers of the first left there."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "a.jsonl").touch()
    cfg = OmegaConf.create({"answers": {"one": str(answers)}})

    def check(**fingerprint: str) -> None:
        (answers / "a.json").write_text(json.dumps({"fingerprint": fingerprint}))
        check_sampled_from(tmp_path / "new", cfg, Origin(Path("c.yaml")), "one")

    check(adapter=adapter_digest(tmp_path / "new"))
    check(adapter=adapter_digest(None))  # Maybe of the merged folder.
    check(model="served")
    with pytest.raises(UserError, match=r"c.yaml: answers.one: .*a.jsonl was sampled from another"):
        check(adapter=adapter_digest(tmp_path / "old"))
    cfg.answers = {"reference": str(answers)}
    for adapter, refused in ((None, False), (tmp_path / "new", True)):
        (answers / "a.json").write_text(
            json.dumps({"fingerprint": {"adapter": adapter_digest(adapter)}})
        )
        with pytest.raises(UserError, match=WITHOUT) if refused else nullcontext():
            check_sampled_from(None, cfg, Origin(Path("c.yaml")), "reference")


def test_the_bases_answers_that_were_sampled_from_another_base(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("copy", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "a.jsonl").touch()
    cfg = OmegaConf.create(
        {"answers": {"reference": str(answers), "one": str(answers)}}
        | {"checkpointer": {"checkpoint_dir": str(tmp_path / "base")}}
    )

    def check(base: str, name: str = "reference", **config: Any) -> None:
        config |= {"checkpointer": {"checkpoint_dir": str(tmp_path / base)}} if base else {}
        settings = {"fingerprint": {"adapter": adapter_digest(None)}, "config": config}
        (answers / "a.json").write_text(json.dumps(settings))
        check_sampled_from(None, cfg, Origin(Path("c.yaml")), name)

    for base in ("base", "copy", "gone", ""):
        check(base)
    check("", checkpointer=None)
    with pytest.raises(UserError, match=r"answers.reference: .*a.jsonl was sampled from another b"):
        check("tuned")
