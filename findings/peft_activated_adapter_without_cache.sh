#!/usr/bin/env bash
# PEFT 0.21.2, Activated LoRA (LoraConfig(alora_invocation_tokens=...)): generate(use_cache=False) gives other tokens.
#
# Expected: greedy tokens do not depend on whether keys and values are kept: those of use_cache=True are also the ones
# that the model's forward gives when all tokens are put in again each time. (A guess beforehand: others, silently.)
# Seen: as guessed. From the second new token on the adapter begins a token later at each step, and the invocation
# itself is soon answered by the base alone. No error, no warning. (Where it begins is counted once, from the end of
# the prompt, and held while the row grows.) A plain LoRA adapter of the same matrices gives the same tokens in all
# three ways. Gradient checkpointing turns the cache off, so this is what samples during a training are.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.14.1" numpy
cat >"$folder/try.py" <<'PYTHON'
import sys

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = torch.tensor([[1, 2, 3, 4, 7, 8, 9]])
NEW = 12


def three_ways(**config):
    """Greedy tokens with the cache, without it, and by the forward of all tokens; how far each is an adapter's."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=matrices, **config)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ways = {}
    for cache in (True, False):
        out = model.generate(input_ids=PROMPT, do_sample=False, max_new_tokens=NEW, use_cache=cache)
        ways[f"use_cache={cache}"] = out[0, PROMPT.shape[1] :].tolist()
    row = PROMPT
    with torch.no_grad():
        for _ in range(NEW):
            row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
    ways["forward of all"] = row[0, PROMPT.shape[1] :].tolist()
    return ways


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = {"plain": three_ways(), "activated": three_ways(alora_invocation_tokens=[7, 8])}
for kind, ways in seen.items():
    for way, tokens in ways.items():
        print(f"{kind}, {way}: {tokens}")
plain, activated = seen["plain"], seen["activated"]
ok = plain["use_cache=True"] == plain["use_cache=False"] == plain["forward of all"]
ok = ok and activated["use_cache=True"] == activated["forward of all"]
ok = ok and activated["use_cache=False"] != activated["use_cache=True"]
ok = ok and activated["use_cache=False"][0] == activated["use_cache=True"][0]
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null
