#!/usr/bin/env bash
# peft 0.18.1, add_weighted_adapter: with the name of an adapter that is there, other weights are
# ignored without a word, and the model goes on with the old combination. After unload() too, since
# the names of a model that was unloaded stay.
#
# Expected: an error as add_adapter raises it, or the new combination. (A guess beforehand: replaced.)
# Seen: the output of weights 5, 5 is that of weights 1, 1; no error, no warning.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "transformers==4.57.6" "peft==0.18.1"
cat >"$folder/try.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(base, config, "one")
model.add_adapter("two", config)
x = torch.ones(1, 4)


def combined(weight):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["one", "two"], [weight, weight], "both", combination_type="cat")
    model.set_adapter("both")
    return model(x).detach(), len(said)


first, _ = combined(1.0)
second, said = combined(5.0)
model.delete_adapter("both")
third, _ = combined(5.0)
print("peft", peft.__version__)
print("weights 1, 1:            ", first.tolist())
print("then 5, 5, the same name:", second.tolist(), f"({said} warnings)")
print("5, 5 after deleting it:  ", third.tolist())
model.base_model.unload()
print("names after unload():    ", sorted(model.peft_config))
seen = torch.equal(first, second) and not torch.equal(first, third) and not said
sys.exit(0 if seen and "both" in model.peft_config else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
