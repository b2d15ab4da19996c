#!/usr/bin/env bash
# PEFT 0.21.2, Lily (LilyConfig): a causal model's output at a token depends on the tokens behind it, on the other rows
# of its batch, and on padding that is masked.
#
# Expected: none of these, as of the base model and of every other adapter here; the docs say that the router's weights
# "depend on the input activations at runtime" and give "the effective B for that layer and input", and of the batch
# nothing. (Guess beforehand, of a scan of all tuners: that rows in a batch are what they are alone, for all of them.
# After reading the layer: as seen.)
# Seen: all of them, and no warning. So a loss on whole rows lets later tokens speak about earlier ones, a sample's
# score changes with the batch size and with its neighbours, and generate(), where a step sees one token, gives other
# tokens with a cache than forward does. A LoRA adapter of the same rank moves by rounding only.
# (LilyLayer's forward averages the router's probabilities over all tokens of all rows, masked or not:
# router_probability.reshape(-1, num_B).mean(dim=0).)
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

NEW = 20


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def tried(config):
    model = peft.get_peft_model(llama(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    torch.manual_seed(1)
    rows = torch.randint(3, 64, (8, 10))

    def logits(ids, mask=None):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits

    def off(a, b):
        return float((a - b).abs().max())

    alone = logits(rows[:1])
    other_end = rows[:1].clone()
    other_end[0, -1] = 7 if int(rows[0, -1]) != 7 else 8
    padded = torch.cat([rows[:1], torch.full((1, 30), 2)], 1)
    mask = (torch.arange(40) < 10).long()[None]
    kept = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": NEW}
    generated = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **kept)[:, 10:]
    ids = rows
    for _ in range(NEW):
        ids = torch.cat([ids, logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return {
        "another last token moves the logits before it": off(logits(other_end)[:, :9], alone[:, :9]),
        "seven other rows in the batch": off(logits(rows)[:1], alone),
        "30 masked pads behind": off(logits(padded, mask)[:, :10], alone),
        "greedy tokens that differ from forward's": int((generated != ids[:, 10:]).sum()),
    }


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
shared = {"r": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
seen = {"Lily": tried(peft.LilyConfig(**shared, num_B=4)), "LoRA": tried(peft.LoraConfig(**shared))}
for name, values in seen.items():
    print(name + ":", "; ".join(f"{what} {value:.3g}" for what, value in values.items()), f"of {8 * NEW}")
ok = all(value > 0.02 for value in seen["Lily"].values()) and all(value < 1e-4 for value in seen["LoRA"].values())
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null
