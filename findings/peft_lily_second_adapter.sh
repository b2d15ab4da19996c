#!/usr/bin/env bash
# PEFT 0.21.2, Lily (LilyConfig): an adapter that is added to a model that has one already is not the one described, and
# what is saved of it is another model when it is loaded first.
#
# Expected: "globally shared B experts", "shared across all layers", and an A for each `stride_A` layers, for every
# adapter; and save_pretrained followed by from_pretrained gives the same outputs. (Guess beforehand: so, from a scan of
# all tuners in which a second adapter is trained, saved and loaded alone.)
# Seen: get_peft_model's adapter shares them. One of add_adapter has A and B in each layer, several times the trainable
# parameters. Trained (here: random) and saved, it gives its outputs again if it is loaded behind another adapter, and
# others if it is loaded alone, since then the layers share and the last one's weights are everyone's. No error, no
# warning. (The sharing is done in _post_injection_hook, which only BaseTuner.__init__ calls.)
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.14.1" numpy
cat >"$folder/try.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


def off(a, b):
    return float((a - b).abs().max())


def own(model, adapter):
    """Numbers of different A and B of an adapter, and of its parameters."""
    named = [(n, p) for n, p in model.named_parameters() if "lily_" in n and f".{adapter}." in n]  # each tensor once
    return sum("lily_A" in n for n, _ in named), sum("lily_B" in n for n, _ in named), sum(p.numel() for _, p in named)


config = peft.LilyConfig(r=8, stride_A=2, num_B=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = peft.get_peft_model(llama(), config, adapter_name="first")
    model.add_adapter("second", config)
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        torch.manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0.0, 0.15)
        outputs[name] = logits(model)
    model.save_pretrained(sys.argv[1])
    alone = {}
    for name in outputs:
        alone[name] = off(logits(peft.PeftModel.from_pretrained(llama(), f"{sys.argv[1]}/{name}")), outputs[name])
    behind = peft.PeftModel.from_pretrained(llama(), f"{sys.argv[1]}/first", adapter_name="first")
    behind.load_adapter(f"{sys.argv[1]}/second", "second")
    behind.set_adapter("second")
    behind = off(logits(behind), outputs["second"])
for name in outputs:
    a, b, size = own(model, name)
    print(
        f"{name}: {a} A, {b} B for 2 kinds of module in 4 layers, {size} parameters; "
        f"loaded alone the logits are off by {alone[name]:.2g}"
    )
print(f"second, loaded behind the first one: off by {behind:.2g}")
print("warnings that name Lily or sharing:", sum("lily" in str(w.message).lower() for w in said))
ok = own(model, "first")[:2] == (4, 2) and own(model, "second")[:2] == (8, 8)
ok = ok and alone["first"] < 1e-5 and behind < 1e-5 and alone["second"] > 0.1
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder/saved" 2>/dev/null
