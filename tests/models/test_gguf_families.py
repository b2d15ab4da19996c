"""Adapters of each family as a LoRA GGUF: llama.cpp's logits are transformers' with PEFT."""

import json
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import family_toys
import peft
import pytest
import torch
import toy_tokenizers
from torch import Tensor
from toy_llama_cpp import llama_server, needs_llama_cpp, write_base

from emarecipes.models.adapters.gguf import save_gguf

VOCABULARY, ASKED = 400, (6, 15, 24)  # Windows are of 8.
# llama.cpp derives from a family what config.json says: which layers have windows, and what
# Gemma's queries are scaled by.
_GEMMA3 = {
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
# The server takes LongRoPE's short factors if its whole context is not above the original one.
_LONG = {"original_max_position_embeddings": 4096, "max_position_embeddings": 8192}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
CASES: dict[str, dict[str, Any]] = {
    "llama 3": {},
    "qwen2.5": {},
    "qwen3": {"head_dim": 16},
    "gemma 2": {"query_pre_attn_scalar": 16},
    "gemma 3": _GEMMA3,
    "gemma 3, images": _GEMMA3,
    "olmo 2": {},
    "phi-3": {"sliding_window": None},
    "phi-3, partial": {"sliding_window": None, "rope_parameters": _PARTIAL},
    "phi-4-mini": {"sliding_window": None} | _LONG,
}


def random_adapter(model: Any, folder: Path) -> Any:
    """Rank-stabilised, with ranks and alphas of their own, on every matrix but the output's.

    Of a model with images, on those of the text.
    """
    images, fused = hasattr(model.config, "vision_config"), model.config.model_type == "phi3"
    config = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True,
        target_modules=r".*language_model.*_proj" if images else "all-linear",
        rank_pattern={"qkv_proj": 6} if fused else {"k_proj": 2},
        alpha_pattern={"down_proj": 2} | ({} if fused else {"v_proj": 2}),
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "lora_B" in name else 0.3
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.eval().save_pretrained(folder)
    return adapted


def served_logits(url: str, tokens: list[int]) -> Tensor:
    """Log-probabilities of every token behind these.

    The bias lets a token be drawn that is a letter: of part of one the server tells nothing. What
    it tells is from before the bias.
    """
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": VOCABULARY}
    body["logit_bias"] = {"40": 1e4}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        (place,) = json.load(reply)["choices"][0]["logprobs"]["content"]
    found = {top["id"]: top["logprob"] for top in place["top_logprobs"]}
    assert len(found) == VOCABULARY
    return torch.tensor([found[token] for token in range(VOCABULARY)])


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_pefts_logits(tmp_path: Path, name: str) -> None:
    folder = toy_tokenizers.write_tokenizer(tmp_path / "model", "none", VOCABULARY)
    changes = {"vocab_size": VOCABULARY} | CASES[name]
    family = name.removesuffix(", partial")
    if (text := getattr(family_toys.configs()[family], "text_config", None)) is not None:
        text.update(changes)
        changes = {"text_config": text}
    model = family_toys.write_folder(family, folder, changes)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(3, VOCABULARY, (1, max(ASKED)), generator=generator)
    places = [length - 1 for length in ASKED]
    base_TV = family_toys.hf_logits(model, row)[0, places].log_softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a base without a name.
        adapted = random_adapter(model, tmp_path / "adapter")
    adapted_TV = family_toys.hf_logits(adapted, row)[0, places].log_softmax(-1)
    save_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", folder)
    base = write_base(folder, tmp_path / "base.gguf", "gpt-2")
    with llama_server(base, tmp_path / "adapter.gguf") as url:
        served_TV = torch.stack([served_logits(url, row[0, :n].tolist()) for n in ASKED])
    moved, off = (float((x - adapted_TV).abs().max()) for x in (base_TV, served_TV))
    print(f"{name}: moves by up to {moved:.2g}, off by up to {off:.2g}")
    assert moved > 0.5 and off < 0.02
