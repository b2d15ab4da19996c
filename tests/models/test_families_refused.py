"""Folders that are not known, or do not belong together, are refused by key."""

import json
from pathlib import Path
from typing import Any

import family_toys
import pytest
import torch
from family_toys import distance, make_toy, tokens
from safetensors.torch import load_file, save_file

from emarecipes.errors import UserError
from emarecipes.models import lora_model
from emarecipes.models.families.checkpoint import FolderCheckpointer
from emarecipes.models.families.known import read_shape
from emarecipes.models.families.names import Names


def write(folder: Path, name: str, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads(family_toys.configs()[name].to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "qwen3",
            {"model_type": "qwen3_moe"},
            "model_type 'qwen3_moe' is not known; known",
        ),
        ("qwen3", {"model_type": None}, "model_type None is not known"),
        ("qwen3", {"model_type": ["llama"]}, "model_type .* is not known"),
        # What these compute without, in transformers.
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and it is not"),
        (
            "llama 3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor is 0.5, and it is not",
        ),
        ("gemma 3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping is 2.0, which"),
        ("gemma 3", {"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters is .* one entry"),
        ("gemma 3", {"rope_scaling": {"rope_theta": 9.0}}, "rope_parameters is .* or rope_scaling"),
        # What is no number that can be computed with.
        ("gemma 2", {"final_logit_softcapping": float("inf")}, "must be a number above 0, not inf"),
        ("granite", {"logits_scaling": 10**400}, "logits_scaling must be a number above 0, not 1"),
        ("llama 3", {"intermediate_size": 10**30}, "intermediate_size must be a whole number"),
        ("llama 3", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, and no model"),
        ("phi-4-mini", {"partial_rotary_factor": [1]}, "partial_rotary_factor"),
        ("phi-4-mini", {"original_max_position_embeddings": "x"}, "must be a whole number above 0"),
        (
            "phi-4-mini",
            {"rope_parameters": LONG | {"short_factor": ["a"] * 4}},
            "short_factor must be a number above 0",
        ),
        (
            "phi-4-mini",
            {"rope_parameters": LONG | {"short_factor": [1.0]}},
            "short_factor must be a list of 4 numbers",
        ),
        (
            "phi-4-mini",
            {"rope_parameters": LONG | {"factor": "x"}},
            "rope_parameters: factor must be a number above 0",
        ),
        ("qwen2", {"max_window_layers": "1"}, "max_window_layers is '1', and a whole number"),
        ("gemma", {"hidden_activation": ["gelu"]}, "hidden_activation is .*, and Gemma's is"),
        ("qwen3", {"rope_parameters": YARN}, "rope_parameters: its type 'yarn' is not known"),
        ("llama 3", {"rope_scaling": YARN}, "rope_scaling: its type 'yarn' is not known"),
        (
            "llama 3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}},
            "rope_scaling: mscale is 0.7, and it is not known that the model computes the same",
        ),
        # On unless a file says otherwise: transformers' attention then looks ahead.
        ("llama 3", {"is_causal": False}, "is_causal is False, and it is not known"),
        ("gemma 3", {"is_causal": None}, "is_causal is None, and it is not known"),
        ("mistral", {"attention_bias": True}, "attention_bias is True, and it is not known"),
        ("llama 3", {"logit_scale": 0.06}, "logit_scale is 0.06, and it is not known"),
        ("llama 3", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama 3", {"hidden_act": "relu2"}, "hidden_act must be one of silu, .*, not 'relu2'"),
        ("llama 3", {"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple of 3"),
        ("llama 3", {"head_dim": 9}, "head_dim is 9, so that 9 of a head's 9 numbers turn"),
        ("llama 3", {"hidden_size": "32"}, "hidden_size must be a whole number above 0, not '32'"),
        ("gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma 3", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be a list of"),
        ("gemma 3, images", {"text_config": {"model_type": "llama"}}, "text_config is .*needed"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 3, one a layer"),
        ("phi-3", {"embedding_multiplier": 2.0}, "embedding_multiplier is 2.0"),
    ],
)
def test_what_is_not_known_is_refused_by_key(
    tmp_path: Path, name: str, fields: dict[str, Any], expected: str
) -> None:
    read_shape(write(tmp_path, name, is_causal=True))
    with pytest.raises(UserError, match=expected) as caught:
        read_shape(write(tmp_path, name, **fields))
    assert "\n" not in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


def test_other_mistakes_are_one_line(tmp_path: Path) -> None:
    lora = {"lora_attn_modules": ["q_proj"], "lora_rank": 4, "lora_alpha": 8}
    with pytest.raises(UserError, match=r"no such folder"):
        lora_model(str(tmp_path / "none"), **lora)
    with pytest.raises(UserError, match=r"no config.json; give a Hugging Face model folder"):
        lora_model(str(tmp_path), **lora)
    write(tmp_path, "qwen3, tied")
    with pytest.raises(UserError, match=r"apply_lora_to_output: .* no place for an adapter"):
        lora_model(str(tmp_path), apply_lora_to_output=True, **lora)
    with pytest.raises(UserError, match=r"max_seq_len must be from 1 to 128"):
        lora_model(str(tmp_path), max_seq_len=129, **lora)
    assert lora_model(str(tmp_path), max_seq_len=64, **lora).max_seq_len == 64
    write(tmp_path, "phi-3")
    with pytest.raises(UserError, match=r"use_dora: .* of a phi3 model, whose weights are fused"):
        lora_model(str(tmp_path), use_dora=True, **lora)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        lora_model(str(tmp_path), **lora)


def test_weights_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    family_toys.write_folder("qwen3, tied", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)

    def shapes(**more: torch.Tensor) -> dict[str, tuple[int, ...]]:
        save_file(state | more, file, metadata={"format": "pt"})
        return FolderCheckpointer(str(tmp_path)).shapes()

    plain = shapes()
    embedding = state["model.embed_tokens.weight"]
    assert shapes(**{"lm_head.weight": embedding.clone()}) == plain
    assert shapes(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}) == plain
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, and lm_head.weight is not"):
        shapes(**{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"score.weight is not of a qwen3 model as its config.json"):
        shapes(**{"score.weight": torch.ones(2, 32)})
    with pytest.raises(UserError, match=r"is stored as I8, which is of quantized weights"):
        shapes(**{"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    # The output layer alone: what is missing is for the comparison with the model to tell.
    embedding_key = "model.embed_tokens.weight"
    state["lm_head.weight"] = state.pop(embedding_key)
    assert shapes() == {k: v for k, v in plain.items() if k != "tok_embeddings.weight"}


def test_a_fused_weight_of_another_form(tmp_path: Path) -> None:
    names = Names(read_shape(write(tmp_path, "phi-3")))
    key = "model.layers.0.self_attn.qkv_proj.weight"
    assert {k: v.shape[0] for k, v in (names.own(key, torch.ones(64, 32)) or {}).items()} == {
        "layers.0.attn.q_proj.weight": 32,
        "layers.0.attn.k_proj.weight": 16,
        "layers.0.attn.v_proj.weight": 16,
    }
    for wrong in (torch.ones(()), torch.ones(32, 32)):
        with pytest.raises(UserError, match=r"qkv_proj.weight has \d+ rows, and .* sizes give 64"):
            names.own(key, wrong)


def test_names_of_older_folders_with_images(tmp_path: Path) -> None:
    """gemma-3-4b-it's own files: language_model.model.layers, vision_tower."""
    toy = make_toy("gemma 3, images", tmp_path)
    expected = toy.logits(tokens())
    file = tmp_path / "model.safetensors"
    old = {}
    for key, tensor in load_file(file).items():
        for today, stored in (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            key = stored + key.removeprefix(today) if key.startswith(today) else key
        old[key] = tensor
    save_file(old, file, metadata={"format": "pt"})
    toy.model.load_state_dict(
        FolderCheckpointer(str(tmp_path)).load_checkpoint()["model"], strict=False
    )
    assert distance(toy.logits(tokens()), expected) == 0.0
    config = json.loads((toy.save_adapter(tmp_path / "a") / "adapter_config.json").read_text())
    assert config["target_modules"].startswith("model\\.language_model\\.")
