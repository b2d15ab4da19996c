#!/usr/bin/env bash
# PEFT 0.21.2, peft.tuners.lora.intruders.reduce_intruder_dimension: the mitigation runs against its documentation,
# and on GPT-2's square layers the new adapter is the old one transposed.
#
# Expected, by its docstring: mitigation_lambda is "the relative portion of the intruder dimensions that is
# subtracted from the adapter's delta weight. The higher the value the more of the intruder dimension is subtracted".
# So 1.0 takes them out whole and 0.0 changes nothing; and what is left is an update of the layer that was adapted.
# (Guesses beforehand, from reading: the reverse; and transposed, silently.)
# Seen: as guessed. 1.0 gives the old adapter again, 0.0 takes out all (0.4 % of the update's norm is left here) and
# the default 0.75 a quarter. Where the layer is a Conv1D (GPT-2; here attn.c_proj, which is square) even 1.0 gives
# another model: the new update is the old one's transpose. No error, no warning. (The paper's lambda is the factor
# that an intruder is scaled by. A Conv1D holds its weight the other way round, and the two factors are not swapped.)
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
from peft.tuners.lora.intruders import reduce_intruder_dimension
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

NEW = "intruder_reduced"


def reduced(family, mitigation_lambda):
    """Old and new update of one adapted layer, and how far the logits moved by the mitigation."""
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        base = LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)
        )
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    else:
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
        base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    (layer,) = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        old, before = layer.get_delta_weight("default").clone(), model(ids).logits
        reduce_intruder_dimension(model, mitigation_lambda=mitigation_lambda, logging_sink=None)
        new, after = layer.get_delta_weight(NEW), model(ids).logits
    return old, new, float((after - before).abs().max())


def share(a, b):
    return float(a.norm() / b.norm())


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for family in ("llama", "gpt2"):
    for value in (0.0, 0.75, 1.0):
        old, new, moved = reduced(family, value)
        seen[family, value] = left, off, turned, moved = (
            share(new, old), share(new - old, old), share(new - old.T, old), moved
        )
        print(
            f"{family}, mitigation_lambda {value}: {left:.3f} of the update's norm left, {off:.3f} from the old one, "
            f"{turned:.3f} from its transpose; logits moved by {moved:.2g}"
        )
whole, default, none = (seen["llama", v] for v in (0.0, 0.75, 1.0))
ok = whole[0] < 0.02 and abs(default[0] - 0.75) < 0.01 and none[1] < 1e-4 and none[3] < 1e-5
square = seen["gpt2", 1.0]
ok = ok and square[2] < 1e-4 and square[1] > 1 and square[3] > 0.1
sys.exit(0 if ok else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null
