"""Exported adapters and merged models against torchtune, peft and transformers on toy models."""

import json
import math
from pathlib import Path

import pytest
import torch
from hf_toys import (
    RANK,
    TOLERANCE,
    distance,
    hf_logits,
    load_hf,
    load_peft,
    make_toy,
    tune_logits,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from emarecipes.errors import UserError
from emarecipes.models import _torchtune_convert as convert
from emarecipes.models.adapters.layout import exported_scale

LORA = ["llama3_2", "llama3", "qwen2_5", "mistral", "gemma2", "phi3"]


DORA = LORA[:-1]


CASES = [(name, False) for name in LORA] + [(name, True) for name in DORA]


cases = pytest.mark.parametrize(("name", "dora"), CASES)


@cases
def test_peft_gives_torchtunes_logits(tmp_path: Path, name: str, dora: bool) -> None:
    toy = make_toy(tmp_path, name, dora=dora)
    base = hf_logits(toy.hf)
    expected = tune_logits(toy)
    toy.save(tmp_path / "adapter", dropout=0.1)
    assert distance(expected, base) > 0.2
    peft = load_peft(toy, tmp_path / "adapter")
    assert distance(hf_logits(peft), expected) < TOLERANCE
    with peft.disable_adapter():
        assert distance(hf_logits(peft), base) < TOLERANCE


@cases
def test_merged_folder_gives_torchtunes_logits(tmp_path: Path, name: str, dora: bool) -> None:
    toy = make_toy(tmp_path, name, dora=dora)
    before = {key: tensor.clone() for key, tensor in toy.base_state.items()}
    toy.save_merged(tmp_path / "merged")
    assert distance(hf_logits(load_hf(tmp_path / "merged")), tune_logits(toy)) < TOLERANCE
    assert all(torch.equal(before[key], toy.base_state[key]) for key in before)


@pytest.mark.parametrize("name", LORA)
def test_saving_is_the_inverse_of_loading(tmp_path: Path, name: str) -> None:
    toy = make_toy(tmp_path, name)
    toy.save_merged(tmp_path / "copy", state=toy.base_state)
    saved, loaded = toy.hf.state_dict(), load_hf(tmp_path / "copy").state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_torchtune_exchanges_gemma2_norms_unless_repaired(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "gemma2", update=0.0)
    assert distance(tune_logits(toy), hf_logits(toy.hf)) < TOLERANCE
    toy.tune.load_state_dict(convert.fix_loaded_state(toy.base_state, "GEMMA2"), strict=False)
    assert distance(tune_logits(toy), hf_logits(toy.hf)) > 0.5
    assert convert.fix_loaded_state(toy.base_state, "LLAMA3") is toy.base_state


def test_structure_is_read_from_a_wrapped_model_on_meta(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi3")
    expected = tune_logits(toy)
    set_activation_checkpointing(toy.tune, {TransformerSelfAttentionLayer})
    assert any("_checkpoint_wrapped_module" in name for name, _ in toy.tune.named_modules())
    toy.tune.to("meta")
    toy.save(tmp_path / "adapter")
    assert distance(hf_logits(load_peft(toy, tmp_path / "adapter")), expected) < TOLERANCE


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "k_proj"]])
def test_fused_layer_with_some_parts_adapted(tmp_path: Path, modules: list[str]) -> None:
    toy = make_toy(tmp_path, "phi3", modules=modules, alpha=16 * math.sqrt(RANK) * 1.00001)
    toy.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    times = len(modules)
    qkv = "model.layers.1.self_attn.qkv_proj"
    assert config["rank_pattern"].get(qkv, RANK) == RANK * times
    # Fused or not, alpha / sqrt(rank) is 16 / 2.
    stabilised = config["alpha_pattern"].get(qkv, 16) / math.sqrt(RANK * times)
    assert config["use_rslora"] and stabilised == pytest.approx(8)
    assert distance(hf_logits(load_peft(toy, tmp_path / "adapter")), tune_logits(toy)) < TOLERANCE


def test_dora_on_fused_layers_is_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "phi3", dora=True)
    with pytest.raises(UserError, match="qkv_proj is fused"):
        toy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_torchtunes_own_dora_scales_the_bias(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "qwen2_5", dora=True)
    ours = tune_logits(toy)
    layers = [m for m in toy.tune.modules() if type(m) is convert.PlainBiasDoRALinear]
    assert len(layers) == 3 * 2
    for layer in layers:
        layer.__class__ = convert.DoRALinear
    assert distance(tune_logits(toy), ours) > 0.1


def test_repaired_dora_equals_torchtunes_where_the_bias_is_zero() -> None:
    torch.manual_seed(0)
    layer = convert.DoRALinear(8, 6, rank=2, alpha=3.0, use_bias=True)
    torch.nn.init.normal_(layer.lora_b.weight)
    torch.nn.init.normal_(layer.magnitude)
    torch.nn.init.zeros_(layer.bias)
    x = torch.randn(3, 8)
    outputs = []
    for disabled in (False, True):
        layer.disabled = disabled
        outputs.append(layer(x))
    convert.fix_dora_bias(layer)
    assert type(layer) is convert.PlainBiasDoRALinear
    for disabled, expected in zip((False, True), outputs, strict=True):
        layer.disabled = disabled
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("alpha", "rank", "expected"),
    [
        (64, 32, (64, False)),
        (64.0, 32, (64, False)),
        (362.04, 32, (64, True)),
        (64 * math.sqrt(32), 32, (64, True)),
        (16 * math.sqrt(8), 8, (16, True)),
        (20.4, 32, (20, False)),
        (0.3, 16, (1, False)),
    ],
)
def test_scale_rule(alpha: float, rank: int, expected: tuple[int, bool]) -> None:
    lora_alpha, use_rslora, ratio = exported_scale(alpha, rank)
    assert (lora_alpha, use_rslora) == expected
    assert isinstance(lora_alpha, int)
    exported = lora_alpha / (math.sqrt(rank) if use_rslora else rank)
    assert exported * ratio == pytest.approx(alpha / rank, rel=1e-12)


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(362.04, 32, 362), (64, 32, 64)])
def test_plain_scale_rule(alpha: float, rank: int, expected: int) -> None:
    lora_alpha, use_rslora, ratio = exported_scale(alpha, rank, plain=True)
    assert (lora_alpha, use_rslora) == (expected, False)
    assert lora_alpha / rank * ratio == pytest.approx(alpha / rank, rel=1e-12)


@pytest.mark.parametrize(("name", "dora"), [("qwen2_5", True), ("phi3", False)])
def test_a_plain_scale_is_one_alpha_over_each_rank(tmp_path: Path, name: str, dora: bool) -> None:
    """Phi-3's fused layers have two and three times the rank."""
    toy = make_toy(tmp_path, name, dora=dora, alpha=5.3, update=0.03)
    toy.save(tmp_path / "adapter", plain_scale=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"], config["alpha_pattern"]) == (5, False, {})
    assert set(config["rank_pattern"].values()) == ({8, 12} if name == "phi3" else set())
    assert distance(hf_logits(load_peft(toy, tmp_path / "adapter")), tune_logits(toy)) < TOLERANCE


@pytest.mark.parametrize("alpha", [0, -1.0])
def test_scale_must_be_positive(alpha: float) -> None:
    with pytest.raises(UserError, match="not positive"):
        exported_scale(alpha, 8)


@pytest.mark.parametrize("alpha", [32.01, 5.3])
@pytest.mark.parametrize("name", ["qwen2_5", "phi3"])
def test_what_an_integer_alpha_leaves_is_in_b(tmp_path: Path, name: str, alpha: float) -> None:
    toy = make_toy(tmp_path, name, alpha=alpha, update=0.03)
    toy.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert type(config["lora_alpha"]) is int
    assert distance(hf_logits(load_peft(toy, tmp_path / "adapter")), tune_logits(toy)) < TOLERANCE


@pytest.mark.parametrize(("alpha", "dtype"), [(6.0, torch.bfloat16), (5.3, torch.float32)])
def test_bf16_adapter_keeps_its_factor(tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    toy = make_toy(tmp_path, "qwen2_5", alpha=alpha)
    toy.adapter = {key: tensor.bfloat16() for key, tensor in toy.adapter.items()}
    toy.tune.load_state_dict(toy.adapter, strict=False)
    toy.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for key, t in saved.items() if "lora_B" in key} == {dtype}
    assert distance(hf_logits(load_peft(toy, tmp_path / "adapter")), tune_logits(toy)) < TOLERANCE


def test_adapter_config(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, "llama3")
    toy.save(tmp_path / "adapter", dropout=0.05)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "lm_head",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert config["base_model_name_or_path"] == str(toy.base_dir)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.05)
    assert not config["use_dora"] and not config["rank_pattern"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert distance(hf_logits(model.eval()), tune_logits(toy)) < TOLERANCE
