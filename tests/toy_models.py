"""Tiny torchtune models with LoRA and random weights, and ragged micro-batches for them."""

from typing import Any

import torch
from torchtune.models.gemma2 import lora_gemma2
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.models.mistral import lora_mistral
from torchtune.models.phi3 import lora_phi3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, get_adapter_params, set_trainable_params

FAMILIES = ("llama3", "llama3_2", "qwen2_5", "qwen2_tied", "mistral", "gemma2", "phi3")
UNTIED = ("llama3", "qwen2_5", "mistral", "phi3")
"""Families with an output matrix of their own, so ``lora_output`` is possible."""

VOCAB_SIZE = 61

BUILDERS = {
    "llama3": lora_llama3,
    "llama3_2": lora_llama3_2,
    "qwen2_5": lora_qwen2,
    "qwen2_tied": lora_qwen2,
    "mistral": lora_mistral,
    "gemma2": lora_gemma2,
    "phi3": lora_phi3,
}


def toy_model(
    family: str, *, lora_output: bool = False, dora: bool = False, seed: int = 0, **overrides: Any
) -> TransformerDecoder:
    """Return a 2-layer fp32 model with random base, norm and adapter weights; only adapters train.

    ``overrides`` go to the torchtune builder. Gemma-2 gets a sliding window of 4 and a final cap
    of 5, so both matter on short rows with small logits.
    """
    if lora_output and family not in UNTIED:
        raise ValueError(f"{family} ties its output to the embedding: no adapter on it")
    arguments: dict[str, Any] = {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "vocab_size": VOCAB_SIZE,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 32,
        "intermediate_dim": 48,
        "max_seq_len": 64,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "use_dora": dora,
    }
    if family in UNTIED:
        arguments["apply_lora_to_output"] = lora_output
    if family == "qwen2_tied":
        arguments["tie_word_embeddings"] = True
    if family == "gemma2":
        arguments["head_dim"] = 16
        arguments["query_pre_attn_scalar"] = 12
        arguments["sliding_window_size"] = 4
        arguments["final_capping_value"] = 5.0
    arguments.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[family](**arguments).float()
        randomise(model)
    set_trainable_params(model, get_adapter_params(model))
    return model


@torch.no_grad()
def randomise(model: TransformerDecoder) -> None:
    """Draw every parameter: matrices N(0, 1/fan_in), biases and norms off their neutral values."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("magnitude"):
            continue
        if name.endswith("scale"):  # RMSNorm around 1, GemmaRMSNorm (which adds 1) around 0
            parameter.copy_(parameter + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif name == "tok_embeddings.weight":
            parameter.copy_(0.4 * noise)
        elif name.endswith("lora_b.weight"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
            module.magnitude.mul_(1.0 + 0.2 * torch.randn(module.magnitude.shape))


def toy_microbatches(
    vocab_size: int = VOCAB_SIZE,
    n_micro: int = 2,
    batch: int = 2,
    seed: int = 0,
    with_safe: bool = True,
) -> list[dict[str, Any]]:
    """Return micro-batches of tokens (B, S), labels (B, S), lengths and sources.

    Neighbouring rows differ in length; the odd micro-batches are padded beyond their longest row;
    the padding token 0 also occurs as a real token. Prompts are masked. The very first row has no
    prompt, so position 0 carries a label, and has an ignored token in the middle; the very last
    row has one label only. Sources alternate 'task', 'safe' (all 'task' without ``with_safe``).
    """
    generator = torch.Generator().manual_seed(seed)
    microbatches = []
    row = 0
    n_rows = n_micro * batch
    for m in range(n_micro):
        lengths = []
        for b in range(batch):
            extra = int(torch.randint(0, 3, (), generator=generator))
            lengths.append((11 if b % 2 == 0 else 7) + extra)
        width = max(lengths) + (2 if m % 2 == 1 else 0)
        tokens = torch.zeros(batch, width, dtype=torch.long)
        labels = torch.full((batch, width), -100, dtype=torch.long)
        sources = []
        for b, length in enumerate(lengths):
            tokens[b, :length] = torch.randint(0, vocab_size, (length,), generator=generator)
            if row == 0:
                tokens[b, 2] = 0
                prompt = 0
            elif row == n_rows - 1:
                prompt = length - 1
            else:
                prompt = int(torch.randint(2, 5, (), generator=generator))
            labels[b, prompt:length] = tokens[b, prompt:length]
            if row == 0:
                labels[b, 5] = -100
            sources.append("safe" if with_safe and row % 2 == 1 else "task")
            row += 1
        microbatches.append(
            {"tokens": tokens, "labels": labels, "lengths": lengths, "sources": sources}
        )
    return microbatches
