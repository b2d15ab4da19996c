"""An adapter that was saved for PEFT comes back as it was, on every family."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter, get_adapter_params
from toy_models import FAMILIES
from toy_saved import saved

from emarecipes.errors import UserError
from emarecipes.models.adapters.read import check_adapter, load_adapter

CASES = [
    (name, dora) for name in FAMILIES for dora in (False, True) if (name, dora) != ("phi3", True)
]


UNLIKE = {"lora_rank": 6, "lora_alpha": 5.0}


@torch.no_grad()
def logits(model: TransformerDecoder) -> Tensor:
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    return model(tokens)


@pytest.mark.parametrize(("family", "dora"), CASES)
def test_loading_is_the_inverse_of_saving(tmp_path: Path, family: str, dora: bool) -> None:
    case = saved(tmp_path, family, dora=dora)
    other = case.fresh()
    assert (logits(other) - logits(case.model)).abs().max() > 0.1
    load_adapter(other, case.folder, case.source)
    expected, found = get_adapter_params(case.model), get_adapter_params(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(logits(other), logits(case.model))


@pytest.mark.parametrize(("family", "dora"), CASES)
@pytest.mark.parametrize("alpha", [8.0, 16 * math.sqrt(4), 5.3, 7.0 * 4**0.5 * 1.00001])
def test_another_rank_and_scale_give_the_same_logits(
    tmp_path: Path, family: str, dora: bool, alpha: float
) -> None:
    case = saved(tmp_path, family, dora=dora, alpha=alpha)
    other = case.fresh(**UNLIKE)
    load_adapter(other, case.folder, case.source)
    # In double precision: what is left is the rounding of the stored B, not that of two forwards
    # whose products have other shapes, which differs from CPU to CPU.
    expected = logits(case.model.double())
    difference = (logits(other.double()) - expected).abs().max()
    # At a scale of 16 the toy's logits reach 30.
    assert difference < 1e-5 * max(1.0, float(expected.abs().max()))


def test_rank_stabilised_scale_by_hand(tmp_path: Path) -> None:
    case = saved(tmp_path, "llama3_2", alpha=64 * math.sqrt(4))
    case.edit_config(use_rslora=True, lora_alpha=3)
    other = case.fresh(lora_rank=8, lora_alpha=2.0)
    load_adapter(other, case.folder, case.source)
    b = other.layers[0].attn.v_proj.lora_b.weight
    factor = (3 / math.sqrt(4)) / (2.0 / 8)
    torch.testing.assert_close(b[:, :4], case.model.layers[0].attn.v_proj.lora_b.weight * factor)
    assert not b[:, 4:].any()


def test_patterns_of_one_module(tmp_path: Path) -> None:
    case = saved(tmp_path, "llama3_2")
    tensors = case.tensors()
    name = "model.layers.1.mlp.down_proj"
    key = f"base_model.model.{name}.lora_"
    tensors[f"{key}A.weight"] = tensors[f"{key}A.weight"][:2]
    tensors[f"{key}B.weight"] = tensors[f"{key}B.weight"][:, :2]
    case.write_tensors(tensors)
    with pytest.raises(UserError, match=f"gives {name} rank 4, its weights have 2"):
        check_adapter(case.folder, case.source)
    case.edit_config(rank_pattern={r"layers\.1\.mlp\.down_proj": 2}, alpha_pattern={"down_proj": 6})
    other = case.fresh()
    load_adapter(other, case.folder, case.source)
    ours, theirs = other.layers[1].mlp.w2, case.model.layers[1].mlp.w2
    # alpha 6 at rank 2, in a module whose scale is 8 / 4.
    torch.testing.assert_close(ours.lora_b.weight[:, :2], theirs.lora_b.weight[:, :2] * 3 / 2)
    assert not ours.lora_b.weight[:, 2:].any()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_take_turns(tmp_path: Path, dora: bool) -> None:
    case = saved(tmp_path, "qwen2_5", dora=dora)
    (tmp_path / "narrow").mkdir()
    narrow = saved(
        tmp_path / "narrow",
        "qwen2_5",
        dora=dora,
        lora_attn_modules=["q_proj"],
        apply_lora_to_mlp=False,
    )
    model = case.fresh()
    load_adapter(model, case.folder, case.source)
    expected = logits(model)
    load_adapter(model, narrow.folder, case.source)
    base = {k: t for k, t in case.model.state_dict().items() if "lora" not in k and "mag" not in k}
    narrow.model.load_state_dict(base, strict=False)
    assert torch.allclose(logits(model), logits(narrow.model), atol=1e-5)
    v_proj = model.layers[0].attn.v_proj
    assert not v_proj.lora_b.weight.any()
    with disable_adapter(model):
        without_adapter = logits(model)
    load_adapter(model, case.folder, case.source)
    assert torch.equal(logits(model), expected)
    assert (expected - without_adapter).abs().max() > 0.1


def test_a_lora_adapter_on_a_dora_model(tmp_path: Path) -> None:
    case = saved(tmp_path, "qwen2_5")
    case.dora = True
    other = case.fresh()
    load_adapter(other, case.folder, case.source)
    assert (logits(other) - logits(case.model)).abs().max() < 1e-5


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "k_proj"]])
def test_some_parts_of_a_fused_layer(tmp_path: Path, modules: list[str]) -> None:
    case = saved(tmp_path, "phi3", lora_attn_modules=modules, apply_lora_to_mlp=False)
    for wider in (modules, ["q_proj", "k_proj", "v_proj"]):
        other = case.fresh(lora_attn_modules=wider, **UNLIKE)
        load_adapter(other, case.folder, case.source)
        assert (logits(other) - logits(case.model)).abs().max() < 1e-5
    other = case.fresh(lora_attn_modules=["q_proj" if modules != ["q_proj"] else "k_proj"])
    with pytest.raises(UserError, match=r"it adapts all of .*qkv_proj, the model has LoRA on"):
        load_adapter(other, case.folder, case.source)


def test_an_adapter_that_peft_trained_on_a_fused_layer(tmp_path: Path) -> None:
    """One A for q, k and v, and a dense B."""
    case = saved(tmp_path, "phi3")
    dense = {}
    for key, tensor in case.tensors().items():
        noise = 0.1 * torch.randn(tensor.shape[0], 4)
        dense[key] = tensor[:4] if "lora_A" in key else tensor[:, :4] + noise
    case.write_tensors(dense)
    case.edit_config(rank_pattern={}, alpha_pattern={})
    other = case.fresh()
    load_adapter(other, case.folder, case.source)
    layer = "base_model.model.model.layers.0.self_attn.qkv_proj"
    a, b = (dense[f"{layer}.lora_{leaf}.weight"] for leaf in "AB")
    attention = other.layers[0].attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = torch.cat([part.lora_b.weight @ part.lora_a.weight for part in parts])
    torch.testing.assert_close(joined, b @ a)
