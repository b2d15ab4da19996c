"""An adapter that was saved for PEFT comes back as it was, on every family."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_toys
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter, get_adapter_params
from toy_models import FAMILIES, toy_model

from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.models._torchtune_convert import fix_dora_bias
from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.adapters.files import read_adapter_config, read_tensors
from emarecipes.models.adapters.read import check_adapter, load_adapter

MODEL_TYPES = {
    "llama3": "LLAMA3",
    "llama3_2": "LLAMA3_2",
    "qwen2_5": "QWEN2",
    "qwen2_tied": "QWEN2",
    "mistral": "MISTRAL",
    "gemma2": "GEMMA2",
    "phi3": "PHI3_MINI",
}
CASES = [
    (name, dora) for name in FAMILIES for dora in (False, True) if (name, dora) != ("phi3", True)
]
UNLIKE = {"lora_rank": 6, "lora_alpha": 5.0}


@dataclass
class Saved:
    """A model with an adapter, and that adapter in a folder."""

    model: TransformerDecoder
    folder: Path
    source: ModelSource
    family: str
    dora: bool

    def fresh(self, **overrides: Any) -> TransformerDecoder:
        """The same base with another adapter."""
        model = toy_model(self.family, dora=self.dora, seed=1, **overrides)
        base = {k: v for k, v in self.model.state_dict().items() if k in model.state_dict()}
        model.load_state_dict(
            {k: v for k, v in base.items() if "lora" not in k and "magnitude" not in k},
            strict=False,
        )
        fix_dora_bias(model)
        return model.eval()

    def edit_config(self, **changes: Any) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    def write_tensors(self, tensors: dict[str, Tensor]) -> None:
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            self.folder / "adapter_model.safetensors",
        )


def saved(
    folder: Path, family: str, *, dora: bool = False, alpha: float = 8.0, **overrides: Any
) -> Saved:
    model = toy_model(family, dora=dora, lora_alpha=alpha, **overrides).eval()
    fix_dora_bias(model)
    (base := folder / "base").mkdir()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    if family == "gemma2":
        config["head_dim"] = 16
    (base / "config.json").write_text(json.dumps(config))
    source = ModelSource(model, base, MODEL_TYPES[family])
    save_adapter(
        get_adapter_params(model), model, source.model_type, base, folder / "adapter",
        rank=4, alpha=alpha,
    )  # fmt: skip
    return Saved(model, folder / "adapter", source, family, dora)


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


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda c: (c.folder / "adapter_config.json").unlink(),
            r"not an adapter folder: no adapter_config",
        ),
        (
            lambda c: (c.folder / "adapter_model.safetensors").unlink(),
            r"no adapter_model.safetensors",
        ),
        (lambda c: (c.folder / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda c: (c.folder / "adapter_model.safetensors").write_text("x"), "cannot be read"),
        (lambda c: c.edit_config(peft_type="IA3"), "not the config of a LoRA adapter"),
        (
            lambda c: c.edit_config(init_lora_weights="pissa_niter_4"),
            "init_lora_weights 'pissa_niter_4' changes the base's weights",
        ),
        (lambda c: c.edit_config(init_lora_weights="olora"), "'olora' changes the base's weights"),
        (
            lambda c: c.edit_config(alora_invocation_tokens=[1, 2]),
            r"alora_invocation_tokens is \[1, 2\], which may mean another function",
        ),
        (lambda c: c.edit_config(layer_replication=[[0, 1]]), "layer_replication is"),
        (lambda c: c.edit_config(some_new_method=True), "some_new_method is True, which may"),
        (lambda c: c.edit_config(use_dora=True), "use_dora is True, and .* lacks a magnitude"),
        (lambda c: c.edit_config(bias="all"), "biases or whole modules are not supported"),
        (
            lambda c: c.edit_config(lora_alpha=None),
            "lora_alpha must be a positive number, not None",
        ),
        (lambda c: c.write_tensors({"base_model.model.x.weight": torch.zeros(1)}), "neither LoRA"),
        (
            lambda c: c.write_tensors({k: t for k, t in c.tensors().items() if "lora_B" not in k}),
            "lacks one of lora_A and lora_B",
        ),
        (
            lambda c: c.write_tensors(
                {k.replace("rs.1", "rs.7"): t for k, t in c.tensors().items()}
            ),
            r"it adapts model.layers.7.*, where the model has no LoRA",
        ),
        (
            lambda c: c.write_tensors(
                {k: t[:, :16] if "q_proj.lora_A" in k else t for k, t in c.tensors().items()}
            ),
            "an adapter of another base: a of .*q_proj is 4x16, the model needs 4x32",
        ),
        # Without layers that it was trained on, it would be another adapter.
        (
            lambda c: c.write_tensors({k: t for k, t in c.tensors().items() if "rs.1" not in k}),
            "an incomplete adapter: its config names model.layers.1.* and 6 more, of which",
        ),
        (
            lambda c: c.write_tensors({k: t for k, t in c.tensors().items() if "k_proj" not in k}),
            "an incomplete adapter: its config names model.layers.0.self_attn.k_proj and 1 more",
        ),
        (lambda c: c.edit_config(rank_pattern={"q_prj": 9}), "rank_pattern 'q_prj' is of none of"),
        (lambda c: c.edit_config(alpha_pattern={"(": 9}), "a pattern is no regular expression"),
        (lambda c: c.edit_config(use_rslora="false"), "use_rslora must be true or false, not"),
        (
            lambda c: c.write_tensors({k: t.to(torch.int8) for k, t in c.tensors().items()}),
            r"lora_A.weight is stored as I8, which is of quantized weights",
        ),
    ],
)
def test_what_does_not_belong_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    case = saved(tmp_path, "llama3_2")
    break_it(case)
    with pytest.raises(UserError, match=message) as caught:
        check_adapter(case.folder, case.source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": r".*layers\.\d+\.(self_attn|mlp)\..*_proj"}, None),
        ({"exclude_modules": ["k_proj"]}, "k_proj"),
        ({"layers_to_transform": [0]}, "layers.1"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "layers.0"),
        ({"target_modules": None}, "k_proj"),
    ],
)
def test_which_layers_peft_would_adapt(
    tmp_path: Path, config: dict[str, Any], left_out: str | None
) -> None:
    """By PEFT itself, on a model of the same names: what it leaves out need not be there."""
    import peft
    import transformers

    case = saved(tmp_path, "llama3_2")
    case.edit_config(**config)
    stated = json.loads((case.folder / "adapter_config.json").read_text())
    names = {key.removeprefix("base_model.model.").rpartition(".lora")[0] for key in case.tensors()}
    if stated["target_modules"] is not None:
        llama = transformers.LlamaForCausalLM(hf_toys.family("llama3_2").config)
        keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        settings = {key: stated[key] for key in keys if key in stated}
        tuned = peft.get_peft_model(llama, peft.LoraConfig(**settings))
        names = set(tuned.base_model.targeted_module_names)
    tensors = case.tensors()
    case.write_tensors({k: t for k, t in tensors.items() if not left_out or left_out not in k})
    check_adapter(case.folder, case.source)
    for name in sorted(names)[:1]:
        case.write_tensors({k: t for k, t in tensors.items() if f".{name}." not in k})
        if stated["target_modules"] is not None:
            with pytest.raises(UserError, match=f"its config names {name}"):
                check_adapter(case.folder, case.source)


def test_an_adapter_without_effect_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = saved(tmp_path, "llama3_2")
    tensors = case.tensors()
    read_tensors(case.folder)
    assert "no effect" not in caplog.text
    case.write_tensors({k: t * ("lora_A" in k) for k, t in tensors.items()})
    read_tensors(case.folder)
    assert "the adapter has no effect: every B is zero" in caplog.text


def test_a_bin_adapter_is_read_once_converted_as_the_message_says(tmp_path: Path) -> None:
    case = saved(tmp_path, "llama3_2")
    tensors = case.tensors()
    torch.save(tensors, case.folder / "adapter_model.bin")
    (case.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin is not read") as caught:
        check_adapter(case.folder, case.source)
    assert "\n" not in str(caught.value)
    program, *arguments = shlex.split(str(caught.value).split("convert it: ")[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    converted = case.tensors()
    assert converted.keys() == tensors.keys()
    assert all(converted[name].equal(tensor) for name, tensor in tensors.items())
    check_adapter(case.folder, case.source)


def test_rank_dora_and_modules_must_fit(tmp_path: Path) -> None:
    case = saved(tmp_path, "llama3_2", dora=True)
    with pytest.raises(UserError, match="no such adapter folder"):
        check_adapter(tmp_path / "absent", case.source)
    for overrides, message in (
        ({"lora_rank": 3}, "its rank is 4, the model's 3; set model.lora_rank to at least 4"),
        ({"use_dora": False}, "a DoRA adapter; set model.use_dora: true"),
        ({"apply_lora_to_mlp": False}, r"it adapts model.layers.0.mlp.\w+, where the model has no"),
    ):
        source = ModelSource(case.fresh(**overrides), case.source.checkpoint_dir, "LLAMA3_2")
        with pytest.raises(UserError, match=message):
            check_adapter(case.folder, source)


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    case = saved(tmp_path, "llama3_2")
    other = tmp_path / "other"
    case.edit_config(base_model_name_or_path=str(other))
    check_adapter(case.folder, case.source)  # Gone: nothing to compare.
    other.mkdir()
    check_adapter(case.folder, case.source)  # No safetensors there.
    weights = {}
    for key, b in case.tensors().items():
        if "lora_B" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            weights[name] = torch.zeros(len(b), 48 if "down_proj" in name else 32)
    save_file(weights, other / "model.safetensors")
    check_adapter(case.folder, case.source)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(weights, other / "model.safetensors")
    with pytest.raises(UserError, match=r"another base: .*0.mlp.up_proj.weight is 64x32"):
        check_adapter(case.folder, case.source)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_whose_start_was_taken_out_of_the_base(tmp_path: Path, init: Any) -> None:
    """PEFT's own files: refused as they are, and read where PEFT has converted them."""
    import peft
    import transformers

    base = transformers.LlamaForCausalLM(hf_toys.family("llama3_2").config).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = base(tokens).logits
        settings: Any = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        model = peft.get_peft_model(base, peft.LoraConfig(**settings, init_lora_weights=init))
        torch.testing.assert_close(model(tokens).logits, before)
    model.peft_config["default"].init_lora_weights = True  # PEFT's documented way.
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=f"init_lora_weights '{init}' changes the base's weights"):
        read_adapter_config(tmp_path / "plain")
    layer = next(iter(read_tensors(tmp_path / "plain").values()))
    assert float((layer["b"] @ layer["a"]).abs().max()) > 0.01  # Added to W, it would be wrong.
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert read_adapter_config(tmp_path / "converted")["r"] == 8
    for layer in read_tensors(tmp_path / "converted").values():
        torch.testing.assert_close(layer["b"] @ layer["a"], torch.zeros(64, 64))
