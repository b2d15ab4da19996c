#!/usr/bin/env bash
# torch 2.14.1: where every target is ignored, torch.nn.functional.linear_cross_entropy in chunks gives gradients of NaN,
# and cross_entropy over linear's logits, which it is documented to be equivalent to, gradients of 0.
#
# Expected: the loss is NaN in both (a mean over nothing), and so are the gradients (the guess that was written down
# before: "all rows ignored: nan in both").
# Seen: the loss is NaN in both. The gradients of the plain form, and of linear_cross_entropy with its default
# options=None, are exactly 0; with LinearCrossEntropyOptions() they are NaN, for the input, the weight and the bias, in
# float64, float32 and bfloat16, whatever its chunk, accumulation or retain_graph. So one batch without a target (a row of
# prompt alone, or cut before its answer) leaves a model as it was in the one, and makes each weight NaN in the next step
# in the other. reduction="sum" gives a loss and gradients of 0 in both; a chunk without a target beside one with a
# target does no harm. Else the two agree to rounding, with class weights, a bias and some ignored targets too.
# Looked for in a stored copy of the project's issues: nothing found of it.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.14.1" "numpy<3"
cat >"$folder/try.py" <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

ROWS, WIDTH, CLASSES = 64, 16, 50
Options = torch.nn.LinearCrossEntropyOptions
FORMS = {
    "plain": None,
    "options=None": None,
    "options()": Options(),
    "chunks of 8": Options(batch_chunk_size=8),
    "compact": Options(acc_policy="compact"),
    "retained": Options(allow_retain_graph=True),
}


def loss_and_gradients(form, dtype, ignored, reduction="mean", weighted=False):
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=drawn).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, generator=drawn).to(dtype).requires_grad_()
    bias = torch.randn(CLASSES, generator=drawn).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,), generator=drawn)
    target[:ignored] = -100
    kwargs = {"reduction": reduction}
    if weighted:
        kwargs["weight"] = torch.rand(CLASSES, generator=drawn).to(dtype) + 0.1
    if form == "plain":
        loss = F.cross_entropy(F.linear(x, weight, bias), target, **kwargs)
    else:
        kwargs |= {"linear_bias": bias, "options": FORMS[form]}
        loss = F.linear_cross_entropy(x, weight, target, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, weight.grad, bias.grad


as_described = True
print("every target ignored: loss, largest gradient of input, weight, bias")
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for form in FORMS:
        loss, *gradients = loss_and_gradients(form, dtype, ROWS)
        sizes = [float(g.abs().max()) for g in gradients]
        print(f"  {dtype}, {form}: {float(loss)}, {sizes}")
        nan = form not in ("plain", "options=None")
        as_described &= bool(loss.isnan())
        as_described &= all(bool(g.isnan().all()) if nan else not g.any() for g in gradients)
        summed = loss_and_gradients(form, dtype, ROWS, reduction="sum")
        as_described &= all(not value.any() for value in summed)
print("else: largest difference from the plain form, float64")
for ignored in (0, 20, ROWS - 1):
    for weighted in (False, True):
        plain = loss_and_gradients("plain", torch.float64, ignored, weighted=weighted)
        for form in list(FORMS)[1:]:
            found = loss_and_gradients(form, torch.float64, ignored, weighted=weighted)
            apart = max(float((a - b).abs().max()) for a, b in zip(found, plain))
            as_described &= apart < 1e-12
            print(f"  {ignored} of {ROWS} ignored, class weights {weighted}, {form}: {apart:.1e}")
sys.exit(not as_described)
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
