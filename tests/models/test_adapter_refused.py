"""Adapters that do not belong on the model are refused, or told."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_toys
import pytest
import torch
from safetensors.torch import save_file
from toy_saved import saved

from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.models.adapters.files import read_adapter_config, read_tensors
from emarecipes.models.adapters.read import check_adapter


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
        # PEFT would leave out what is not named, and so be another adapter.
        (
            lambda c: c.edit_config(target_modules=["q_proj", "k_proj", "o_proj", "up_proj"]),
            r"has model.layers.0.*, which its config does not name: PEFT would leave it out",
        ),
        *(
            (lambda c, named=named: c.edit_config(target_modules=named), "names no layer: PEFT wou")
            for named in (None, [], "")
        ),
        (lambda c: c.edit_config(rank_pattern={"q_prj": 9}), "rank_pattern 'q_prj' is of none of"),
        (
            lambda c: c.edit_config(alpha_pattern={"(": 9}),
            r"alpha_pattern: \( is no regular exp",
        ),
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
        with pytest.raises(UserError, match=f"its config names {name}"):
            check_adapter(case.folder, case.source)


def test_without_a_named_layer_peft_adapts_those_of_its_own_choice() -> None:
    """So such a config is refused: what else the weights have would be left out."""
    import peft
    import transformers

    llama = transformers.LlamaForCausalLM(hf_toys.family("llama3_2").config)
    tuned = peft.get_peft_model(llama, peft.LoraConfig(target_modules=None))
    taken = {name.rpartition(".")[2] for name in tuned.base_model.targeted_module_names}
    assert taken == {"q_proj", "v_proj"}


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
