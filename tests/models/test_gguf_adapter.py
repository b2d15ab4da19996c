"""An adapter as a LoRA GGUF: by a slow reading of the file, and in llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import toy_gguf
from safetensors.numpy import load_file, save_file

from emarecipes.export import main

RANK, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 4, 2, 8, 32
SIZES = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": 16, "o_proj": WIDTH}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 12, "use_rslora": False, "bias": "none",
    "target_modules": [*SIZES, "lm_head"],
}  # fmt: skip
MODEL: dict[str, Any] = {
    "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "hidden_size": WIDTH, "tie_word_embeddings": False,
}  # fmt: skip


def write(folder: Path, ranks: dict[str, int] | None = None, **config: Any) -> Path:
    """An adapter of one layer, and its base's config.json in `base`."""
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(MODEL))
    random = np.random.default_rng(0)
    tensors = {}
    names = {f"model.layers.0.self_attn.{part}": size for part, size in SIZES.items()}
    for name, size in (names | {"lm_head": 10}).items():
        rank = (ranks or {}).get(name.rpartition(".")[2], RANK)
        for leaf, shape in (("A", (rank, WIDTH)), ("B", (size, rank))):
            tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = random.normal(
                size=shape
            ).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    base = {"base_model_name_or_path": str(folder / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | base | config))
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"every": 12 / 2}),
        (
            {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 5}},
            {"k_proj": 12 / 2, "v_proj": 5 / 4},
        ),
    ],
)
def test_the_update_is_pefts(
    tmp_path: Path, kind: str, config: dict[str, Any], scales: dict[str, float]
) -> None:
    """alpha / r * B A of the file, in the row order of toy_gguf's slow loop, is PEFT's."""
    folder = write(tmp_path / "adapter", config.get("rank_pattern"), **config)
    (folder / "base/config.json").write_text(json.dumps(MODEL | {"model_type": kind}))
    assert main(["gguf", str(folder)]) == 0
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    meta = {key: field.contents() for key, field in reader.fields.items()}
    assert meta["general.type"] == "adapter" and meta["adapter.type"] == "lora"
    assert meta["general.architecture"] == kind
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    peft = load_file(folder / "adapter_model.safetensors")
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names = {f"model.layers.0.self_attn.{p}": f"blk.0.{g}" for p, g in parts.items()}
    names["lm_head"] = "output"
    assert len(written) == 2 * len(names)
    for name, there in names.items():
        part = name.rpartition(".")[2]
        a, b = (peft[f"base_model.model.{name}.lora_{x}.weight"].astype(float) for x in "AB")
        update = scales.get(part, scales.get("every", 12 / 4)) * b @ a
        if kind == "llama" and part in ("q_proj", "k_proj"):
            update = toy_gguf.meta_order(update, HEADS if part == "q_proj" else KV_HEADS)
        lora_a, lora_b = (written[f"{there}.weight.lora_{x}"].astype(float) for x in "ab")
        found = meta["adapter.lora.alpha"] / lora_a.shape[0] * lora_b @ lora_a
        np.testing.assert_allclose(found, update, rtol=1e-5, atol=1e-5)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"use_dora": True}, {}, "a DoRA adapter, for which a LoRA GGUF has no form"),
    ({"modules_to_save": ["lm_head"]}, {}, "adapters that train biases or whole modules"),
    ({"bias": "all"}, {}, "adapters that train biases or whole modules"),
    ({"base_model_name_or_path": "some/name"}, {}, "'some/name' is no folder"),
    ({"base_model_name_or_path": None}, {}, "say --base DIR"),
    ({}, {"model_type": "granite"}, "model_type is granite, and how llama.cpp orders"),
    ({}, {"tie_word_embeddings": True}, "it adapts lm_head (tied to the embedding)"),
    (
        {},
        {"num_attention_heads": 3},
        "model.layers.0.self_attn.k_proj is for 16 x",
    ),
    ({}, {"hidden_size": 40, "head_dim": 8}, "lm_head is for 10 x 32, the base has 10 x 40"),
    ({}, {"num_hidden_layers": 2}, "names model.layers.1.self_attn.q_proj and 3 more, of which"),
    ({"target_modules": "all-linear"}, {}, "its config names model.layers.0.mlp.gate_proj and 2"),
    ({"r": 8}, {}, "rank 8, its weights have 4"),
    ({"alpha_pattern": {"k_proj": None}}, {}, "alpha_pattern: k_proj must be a positive number"),
    ({"alpha_pattern": {"k_proj": "3"}}, {}, "k_proj must be a positive number, not '3'"),
    ({"rank_pattern": ["k_proj"]}, {}, "rank_pattern must be a mapping, not ['k_proj']"),
    ({"rank_pattern": {"(": 4}}, {}, "rank_pattern: ( is no regular expression"),
    ({"rank_pattern": {"up_proj": 4}}, {}, "rank_pattern 'up_proj' is of none of its layers"),
]


@pytest.mark.parametrize(("config", "model", "line"), WRONG)
def test_what_has_no_form_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    model: dict[str, Any],
    line: str,
) -> None:
    folder = write(tmp_path / "adapter", **config)
    (folder / "base/config.json").write_text(json.dumps(MODEL | model))
    before = sorted(folder.iterdir())
    assert main(["gguf", str(folder)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and line in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "value", "line"),
    [
        (
            "v_proj.lora_B",
            np.ones((20, RANK), np.float32),
            "v_proj is for 20 x 32, the base has",
        ),
        (
            "o_proj.lora_A",
            np.full((RANK, WIDTH), np.nan, np.float32),
            "has a number that is not",
        ),
    ],
)
def test_weights_that_are_not_the_bases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, value: Any, line: str
) -> None:
    folder = write(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.model.layers.0.self_attn.{part}.weight"] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    before = sorted(folder.iterdir())
    assert main(["gguf", str(folder)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error and sorted(folder.iterdir()) == before


def test_the_text_of_a_model_with_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers have a longer name; its output is tied where the file does not say so."""
    folder = write(tmp_path / "adapter")
    (folder / "base/config.json").write_text('{"model_type": "gemma3"}')
    tensors = {
        name.replace("model.layers", "model.language_model.layers"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    assert main(["gguf", str(folder)]) == 1
    assert "it adapts lm_head (tied to the embedding)" in capsys.readouterr().err
    text = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    save_file(text, folder / "adapter_model.safetensors")
    assert main(["gguf", str(folder)]) == 0
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == "gemma3"
    assert {tensor.name for tensor in reader.tensors} == {
        f"blk.0.attn_{part}.weight.lora_{x}" for part in ("q", "k", "v", "output") for x in "ab"
    }


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "adapter", base_model_name_or_path="gone")
    (output := tmp_path / "mine.gguf").write_text("mine")
    arguments = ["gguf", str(folder), "--base", str(folder / "base"), "--output", str(output)]
    assert main(arguments) == 1
    assert "exists; remove it" in capsys.readouterr().err
    output.unlink()
    assert main(arguments) == 0
    assert output.read_bytes()[:4] == b"GGUF"
    assert main(["gguf", str(tmp_path / "none")]) == 1
    assert main([*arguments[:-1], str(tmp_path / "no/such/folder.gguf")]) == 1
