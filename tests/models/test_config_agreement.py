"""config.json against the built model, by field: what is computed otherwise is refused."""

import json
from pathlib import Path
from typing import Any

import hf_toys
import pytest
import torch
import transformers

from emarecipes.errors import UserError
from emarecipes.models.config_agreement import check_agreement, sliding_window

NAMES = ["llama3_2", "llama3", "qwen2_5", "mistral", "gemma2", "phi3"]


def build(name: str, **changes: Any) -> Any:
    family = hf_toys.family(name)
    lora = {"lora_attn_modules": hf_toys.ATTENTION, "lora_rank": 4, "lora_alpha": 4}
    with torch.device("meta"):
        return family.builder(
            **(lora | {"apply_lora_to_mlp": True} | hf_toys.SIZES | family.extra | changes)
        )


def check(folder: Path, name: str, model: Any = None, **fields: Any) -> None:
    family = hf_toys.family(name)
    family.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    check_agreement(folder, model or build(name), family.model_type)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_writes_is_known_whole(tmp_path: Path, name: str) -> None:
    check(tmp_path, name)
    # Every field, not only those that differ from the class.
    check(tmp_path, name, **hf_toys.family(name).config.to_dict())


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE: dict[str, Any] = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("llama3", {"model_type": "smollm3"}, "of a smollm3 model, which torchtune's builders"),
        ("llama3", {"model_type": "granite"}, "of a granite model, which torchtune's builders do"),
        ("llama3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], and it is not known"),
        ("llama3", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, and it is not"),
        ("llama3", {"attention_multiplier": 0.1}, "attention_multiplier is 0.1"),
        ("llama3", {"some_later_field": "on"}, "some_later_field is 'on', and it is not known"),
        ("llama3", {"attention_bias": True}, "attention_bias is True"),
        ("llama3", {"is_causal": False}, "is_causal is False, and it is not known"),
        ("llama3", {"hidden_act": "gelu"}, r"activation SiLU\(\), .* says gelu"),
        ("gemma2", {"hidden_activation": "silu"}, r"activation GELU\(approximate='tanh'\), .*silu"),
        ("llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling linear"),
        ("llama3", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "rotary scaling yarn"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rotary scaling longrope is not known"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("llama3_2", {"rope_scaling": LLAMA3}, r"scale_factor 1, .* says 32.0 \(llama3\)"),
        ("llama3", {"rope_scaling": LLAMA3}, r"scale_factor 1.0, .* says 32.0 \(llama3\)"),
        ("llama3", {"rope_theta": 5e5}, "built with rope_base 10000, .* says 500000"),
        ("llama3", {"tie_word_embeddings": True}, "is untied, .* tie_word_embeddings True"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 24, .* says 256"),
        ("gemma2", {"final_logit_softcapping": 20.0}, "final_capping_value 30, .* says 20"),
        ("gemma2", {"attn_logit_softcapping": 20.0}, "hidden_capping_value 50, .* says 20"),
        ("gemma2", {"sliding_window": 4}, r"windows \[5, None\] by layer, .* says \[4, None\]"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, r"says \[None, None\]"),
    ],
)
def test_what_is_not_known_to_compute_the_same(
    tmp_path: Path, name: str, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        check(tmp_path, name, **fields)


def test_what_does_nothing_is_let_through(tmp_path: Path) -> None:
    check(tmp_path, "llama3", embedding_multiplier=1.0, no_rope_layers=[], attention_bias=False)
    check(tmp_path, "llama3", is_causal=True)
    check(tmp_path, "llama3", rope_scaling={"type": "linear", "factor": 1.0})
    llama3 = build("llama3_2", scale_factor=32)
    check(tmp_path, "llama3_2", llama3, rope_scaling=LLAMA3)
    with pytest.raises(UserError, match=r"high_freq_factor 4, .* says 8"):
        check(tmp_path, "llama3_2", llama3, rope_scaling=LLAMA3 | {"high_freq_factor": 8.0})


def test_a_window_is_the_longest_row(tmp_path: Path) -> None:
    """transformers computes up to the window what it computes without one, and not beyond."""
    config = hf_toys.family("mistral").config
    config.sliding_window = 6
    config.save_pretrained(tmp_path)
    model = build("mistral")
    check_agreement(tmp_path, model, "MISTRAL")
    window = sliding_window(tmp_path, model)
    assert window == 6
    tokens = torch.arange(7)[None]
    torch.manual_seed(0)
    windowed = transformers.MistralForCausalLM(config).eval()
    config = hf_toys.family("mistral").config
    config.sliding_window = None
    whole = transformers.MistralForCausalLM(config).eval()
    whole.load_state_dict(windowed.state_dict())
    with torch.no_grad():
        gaps = (windowed(tokens).logits - whole(tokens).logits).abs().amax(dim=(0, 2))
    assert (gaps > 1e-6).tolist() == [False] * 6 + [True]
    config.save_pretrained(tmp_path)
    assert sliding_window(tmp_path, model) is None
    hf_toys.family("gemma2").config.save_pretrained(tmp_path)
    assert sliding_window(tmp_path, build("gemma2")) is None  # It has the window.
