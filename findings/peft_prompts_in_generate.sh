#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0 (the newest of both; PEFT asks for no particular one), prompt tuning, P-tuning,
# prefix tuning and cartridges of a causal LM: generate() answers as another model than the one that was trained.
#
# Expected: greedy tokens are those that forward gives, token by token, with and without a cache. The docs' page of
# cartridges and PEFT's notebooks of prompt and prefix tuning train with forward and then call generate(). (Guess
# beforehand, for all kinds: so. After the first odd tokens: wrong positions, which was wrong.)
# Seen: with prompt tuning and P-tuning the first new token is right. From the second on the virtual tokens are put in
# again before every single token, so each step is 6 long where there are 5 of them. With prefix tuning and a cartridge
# the prefix is not there at all: what comes out are the base model's own tokens. Without a cache prompt tuning is
# right, and a prefix is right for the first few tokens only. No error. Prompt tuning says nothing but the same notice
# as ever, that position ids are ignored; a prefix has a FutureWarning, of a deprecated argument.
# With transformers 5.23.0 all four are right with a cache, and a prefix without one is an error. (5.24.0 hands
# generate's cache on as `cache`, and no longer as `past_key_values`. PEFT's prepare_inputs_for_generation looks for the
# old name: it finds no cache, takes each step for the first, and gives a prefix under the old name, which is dropped.)
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.14.1" numpy
"$folder/venv/bin/python" -m pip install --quiet --no-deps --target "$folder/before" "transformers==5.23.0"
cat >"$folder/try.py" <<'PYTHON'
import json
import sys
import warnings

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

VIRTUAL, NEW = 5, 12


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


def generated(model, ids, use_cache):
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options)
    return out[0, ids.shape[1]:]


def by_forward(model, ids):
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -NEW:]


def agree(a, b):
    """How many tokens from the first one on are the same."""
    return next((i for i in range(NEW) if a[i] != b[i]), NEW)


shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
kinds = {
    "prompt tuning": peft.PromptTuningConfig(**shared),
    "P-tuning": peft.PromptEncoderConfig(**shared, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(**shared),
    "cartridge": peft.CartridgeConfig(**shared),
}
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
ids = torch.tensor([[1, 17, 33, 9, 41, 28, 50, 12]])
base = generated(llama(), ids, True)
seen = {}
for kind, config in kinds.items():
    model = peft.get_peft_model(llama(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 1.0)
    lengths = []  # of what each step puts into the first layer
    watch = model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cached = generated(model, ids, True)
    watch.remove()
    want = by_forward(model, ids)
    try:
        uncached = agree(generated(model, ids, False), want)
    except RuntimeError as error:  # a prefix under 5.23.0
        uncached = str(error)
    seen[kind] = [agree(cached, want), uncached, agree(cached, base), agree(want, base)]
    print(
        f"{kind}: of {NEW} greedy tokens as by forward, with a cache the first {seen[kind][0]}, "
        f"as the base model's the first {seen[kind][2]} (by forward {seen[kind][3]}), "
        f"lengths {lengths[:4]}; without a cache, as by forward, {uncached}"
    )
    for text in sorted({f"{w.category.__name__}: {str(w.message)[:75]}" for w in said}):
        print("    ", text)
print(json.dumps(seen), file=open(sys.argv[1], "w"))
PYTHON
PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/try.py" "$folder/5.23.json" 2>/dev/null
"$folder/venv/bin/python" "$folder/try.py" "$folder/5.24.json" 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys

before, now = (json.load(open(f"{sys.argv[1]}/{version}.json")) for version in ("5.23", "5.24"))
ok = all(cached == 12 and base < 12 for cached, _, base, _ in before.values())
ok = ok and all(base < 12 for _, _, _, base in now.values())
for kind in ("prompt tuning", "P-tuning"):
    cached, uncached, _, _ = now[kind]
    ok = ok and 1 <= cached < 12 and uncached == 12
for kind in ("prefix tuning", "cartridge"):
    cached, uncached, base, _ = now[kind]
    ok = ok and cached < 12 and uncached < 12 and base == 12
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
