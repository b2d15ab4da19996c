#!/usr/bin/env bash
# torch 2.13.0 (and 2.14.1), torch.optim.Muon with nesterov=False and parameters in bf16: the step
# normalises the momentum buffer in place. Newton-Schulz casts what it is given to bf16, which is no
# copy where it is bf16 already, and divides it by its norm; with nesterov the update is a tensor of
# its own. So after each step the momentum has norm 1, whatever the gradients were.
#
# Expected: 0.05 of the gradient's norm after the first step (momentum 0.95), as in fp32.
# Seen: 1.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat >"$folder/try.py" <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    for nesterov in (True, False):
        weight = torch.nn.Parameter(torch.zeros(6, 9, dtype=dtype))
        optimizer = torch.optim.Muon([weight], momentum=0.95, nesterov=nesterov)
        weight.grad = (100 * torch.randn(6, 9)).to(dtype)
        optimizer.step()
        norm = float(optimizer.state[weight]["momentum_buffer"].float().norm())
        share = norm / float(weight.grad.float().norm())
        seen[dtype, nesterov] = norm
        print(f"{dtype}, nesterov={nesterov}: momentum {norm:.3f}, {share:.4f} of the gradient")
print("torch", torch.__version__)
wrong = seen.pop((torch.bfloat16, False))
right = min(seen.values()) > 20
sys.exit(0 if right and abs(wrong - 1) < 0.01 else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
