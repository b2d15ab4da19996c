"""An adapter on the output layer, beside which PEFT stores the base's own matrix."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toy_run
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emarecipes.errors import UserError
from emarecipes.models.adapters.base_copies import base_copies, check_base_copies
from emarecipes.models.adapters.gguf import save_gguf
from emarecipes.models.adapters.read import check_adapter, load_adapter
from emarecipes.models.source import ModelSource, load_model

KEY = "base_model.model.lm_head.base_layer.weight"
TOKENS = torch.arange(2, 34).view(2, 16)


@pytest.fixture
def adapted(tmp_path: Path, model_dir: Path, request: pytest.FixtureRequest) -> Any:
    """A base, an adapter of PEFT's on q_proj and lm_head, and PEFT's logits."""
    base = toy_run.write_toy_model(tmp_path / "base", model_dir, tied=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"],
        init_lora_weights=False,
    )  # fmt: skip
    tuned = peft.get_peft_model(model, settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return base, tmp_path / "adapter", tuned(TOKENS).logits


def opened(base: Path, folder: Path) -> tuple[Any, ModelSource]:
    config = toy_run.toy_config(base, folder, folder)
    config["model"] = {
        "_component_": "emarecipes.models.lora_model", "path": str(base), "lora_rank": 4,
        "lora_alpha": 8, "lora_attn_modules": ["q_proj"], "apply_lora_to_output": True,
    }  # fmt: skip
    config["checkpointer"] = {
        "_component_": "emarecipes.models.families.checkpoint.FolderCheckpointer",
        "checkpoint_dir": str(base), "model_type": "CONFIG_JSON",
    }  # fmt: skip
    model = load_model(OmegaConf.create(config))
    return model, ModelSource(model, base, "CONFIG_JSON")


def test_a_copy_of_the_bases_output_layer_is_read_over(adapted: Any) -> None:
    base, folder, expected = adapted
    assert base_copies(folder) == {"lm_head.weight": KEY}, "PEFT stores it"
    model, source = opened(base, folder)
    load_adapter(model, folder, source)
    with torch.no_grad():
        assert (model(TOKENS) - expected).abs().max() < 1e-4
    tensors = load_file(folder / "adapter_model.safetensors")
    # As a run in bf16 stores it: the base's, rounded.
    tensors[KEY] = tensors[KEY].bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    check_adapter(folder, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + 1e-3 * (torch.arange(len(t)) == 7)[:, None], "the base was changed, which"),
        (lambda t: t[1:], "another base: it has a lm_head.weight of its own"),
    ],
)
def test_another_matrix_is_refused(adapted: Any, change: Any, message: str) -> None:
    base, folder, _ = adapted
    _, source = opened(base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[KEY] = change(tensors[KEY]).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        check_adapter(folder, source)


def test_a_lora_gguf_has_no_form_for_it(adapted: Any, tmp_path: Path) -> None:
    base, folder, _ = adapted
    with pytest.raises(UserError, match=r"a copy of the base's lm_head.weight.*save_embedding_la"):
        save_gguf(folder, tmp_path / "a.gguf", base)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_a_copy_beside_a_tied_base_is_of_its_embedding(
    tmp_path: Path, model_dir: Path, change: float
) -> None:
    base = toy_run.write_toy_model(tmp_path / "base", model_dir)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({KEY: embedding + change}, tmp_path / "adapter_model.safetensors")
    if not change:
        return check_base_copies(tmp_path, base)
    with pytest.raises(UserError, match=r"is not model.embed_tokens.weight of .*: the base was"):
        check_base_copies(tmp_path, base)
