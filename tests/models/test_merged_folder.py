"""Merged folders: values by hand, what is copied, and failures that leave the old one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_toys import (
    ALPHA,
    RANK,
    TOLERANCE,
    distance,
    hf_logits,
    load_hf,
    make_toy,
    tune_logits,
)

from emarecipes.errors import UserError
from emarecipes.models.adapters import export


def test_merge_in_fp32_from_bf16_by_hand() -> None:
    base = {"layers.0.mlp.w1.weight": torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.bfloat16)}
    adapter = {
        "layers.0.mlp.w1.lora_a.weight": torch.tensor([[0.0, 1.0]]),
        "layers.0.mlp.w1.lora_b.weight": torch.tensor([[-2.0], [0.5]]),
    }
    merged = export.merge_adapter(base, adapter, rank=1, alpha=2.0)["layers.0.mlp.w1.weight"]
    assert merged.dtype == torch.float32
    assert merged.tolist() == [[3.0, 0.0], [1.0, 1.0]]
    adapter["layers.0.mlp.w1.magnitude"] = torch.tensor([6.0, 2.0])
    merged = export.merge_adapter(base, adapter, rank=1, alpha=2.0)["layers.0.mlp.w1.weight"]
    torch.testing.assert_close(merged, torch.tensor([[6.0, 0.0], [2**0.5, 2**0.5]]))


def test_rounding_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256).bfloat16()
    base = {"a.weight": weight, "b.weight": torch.randn(256, 256)}
    noise = torch.randn(256, 256)
    small = weight.float() + noise * 1e-3
    merged = {"a.weight": small, "b.weight": base["b.weight"]}
    lost = (small.bfloat16().double() - small).norm() / (small.double() - weight).norm()
    error = export.rounding_error(base, merged, torch.bfloat16)
    assert error == pytest.approx(float(lost), rel=1e-5)
    assert 0.7 < error < 1.0
    large = {**merged, "a.weight": weight.float() + noise}
    assert export.rounding_error(base, large, torch.bfloat16) < 0.01
    assert export.rounding_error(base, merged, torch.float32) == 0.0
    assert export.rounding_error(base, base, torch.bfloat16) == 0.0


def test_bf16_folder_loses_a_small_update(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2", update=0.001)
    error = export.rounding_error(toy.base_state, toy.merged(), torch.bfloat16)
    assert error > 1.0
    toy.save_merged(tmp_path / "merged", dtype=torch.bfloat16)
    model = load_hf(tmp_path / "merged")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_sharded_folder(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi3")
    toy.save_merged(tmp_path / "merged", shard_bytes=60_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert {p.name for p in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in toy.hf.parameters())
    assert all(path.stat().st_size < 65_000 for path in files)
    assert distance(hf_logits(load_hf(tmp_path / "merged")), tune_logits(toy)) < TOLERANCE


def test_fp32_folder_of_a_bf16_base(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3")
    toy.base_state = {key: tensor.bfloat16() for key, tensor in toy.base_state.items()}
    toy.tune.load_state_dict(toy.base_state, strict=False)
    toy.save_merged(tmp_path / "merged")
    assert distance(hf_logits(load_hf(tmp_path / "merged")), tune_logits(toy)) < TOLERANCE


def test_what_is_copied(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    copied = ["tokenizer.json", "chat_template.jinja", "LICENSE", "NOTICE.md", "merges.txt"]
    for name in [*copied, "model.safetensors.index.json", "README.md", "weights.bin"]:
        (toy.base_dir / name).write_text("{}")
    toy.save_merged(tmp_path / "merged")
    expected = {*copied, "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected


def test_files_that_take_the_place_of_the_bases(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt"):
        (toy.base_dir / name).write_text("base")
    files = {"tokenizer.json": b"other", "chat_template.jinja": None, "added_tokens.json": b"{}"}
    toy.save_merged(tmp_path / "merged", files=files)
    found = {p.name: p.read_text() for p in (tmp_path / "merged").iterdir() if p.name in files}
    assert found == {"tokenizer.json": "other", "added_tokens.json": "{}"}
    assert (tmp_path / "merged" / "merges.txt").read_text() == "base"


def test_an_output_layer_that_left_its_embedding_is_kept(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3")
    path = toy.base_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    toy.save_merged(tmp_path / "merged")
    assert distance(hf_logits(load_hf(tmp_path / "merged")), tune_logits(toy)) < TOLERANCE


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("failing", ["save_file", "fsync", "rename"])
def test_a_failure_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: bool, failing: str
) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    target = tmp_path / "out"
    save = toy.save_merged if merged else toy.save
    save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    toy.adapter = {key: tensor * 2 for key, tensor in toy.adapter.items()}
    with monkeypatch.context() as patch:
        if failing == "rename":
            rename = Path.rename
            patch.setattr(
                Path, "rename", lambda a, b: fail() if a.name == ".out.new" else rename(a, b)
            )
        else:
            patch.setattr(os if failing == "fsync" else export, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            save(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    save(target)
    after = {path.name: path.read_bytes() for path in target.iterdir()}
    assert after.keys() == before.keys() and after != before
    assert not list(tmp_path.glob(".out*"))


def test_an_old_folder_put_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    toy.save(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="not of rank"):
        toy.save(tmp_path / "out", rank=8)
    toy.save(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    for target in (toy.base_dir, tmp_path):
        with pytest.raises(UserError, match="holds the base model"):
            toy.save_merged(target)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        toy.save(mine)
    assert (mine / "thesis.tex").exists()


def test_broken_adapters_are_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    b = "layers.0.attn.q_proj.lora_b.weight"
    broken = [
        ({}, "no weights"),
        ({**toy.adapter, "layers.0.attn.q_proj.weight": torch.zeros(1)}, "neither LoRA nor DoRA"),
        ({key: t for key, t in toy.adapter.items() if key != b}, "other layers"),
        ({key.replace("layers.1", "layers.9"): t for key, t in toy.adapter.items()}, "not a"),
    ]
    for state, message in broken:
        with pytest.raises(UserError, match=message):
            toy.save(tmp_path / "out", adapter_state=state)
    with pytest.raises(UserError, match="not a layer of the base"):
        export.merge_adapter({}, toy.adapter, rank=RANK, alpha=ALPHA)


def test_config_of_another_model_is_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    path = toy.base_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 8}))
    with pytest.raises(UserError, match="8 heads"):
        toy.save(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        toy.save(tmp_path / "out")


def test_families_without_a_converter_are_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3_2")
    toy.family.model_type = "T5_ENCODER"
    with pytest.raises(UserError, match="T5_ENCODER"):
        toy.save(tmp_path / "out")
