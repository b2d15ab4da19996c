#!/usr/bin/env bash
# torchtune 0.6.1, PackedDataset: with train_on_input (or plain texts), the first token of every
# conversation of a pack but the first is a target: the last position of the conversation before it is
# trained to predict it, though masks and positions keep the two apart. Unpacked, the same rows do not
# train it.
#
# Expected: packing changes speed and not the loss. (No guess beforehand: seen while reading.)
# Seen: three conversations of 4 tokens have 11 targets packed and 9 unpacked; the sum of the loss is
# that of the 9 and two more, exactly.
# (Labels are put one behind the other, and the recipe shifts the whole pack by one.)
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "torchao==0.15.0" "torchtune==0.6.1"
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from torch.nn import functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.models.llama2 import llama2

torch.manual_seed(0)
model = llama2(
    vocab_size=40, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=16, max_seq_len=64
)
rows = [[1, 7, 8, 2], [1, 9, 5, 2], [1, 4, 6, 2]]  # All tokens are trained: train_on_input.


def shifted(labels):
    """As torchtune's recipes do before the loss."""
    last = torch.full((labels.shape[0], 1), CROSS_ENTROPY_IGNORE_IDX)
    return torch.hstack((labels[..., 1:], last))


def losses(tokens, labels, **options):
    """The loss of each position that has a target."""
    with torch.no_grad():
        logits = model(tokens, **options)
    if isinstance(logits, list):
        logits = torch.cat(logits, dim=1)
    found = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return found[labels.flatten() != CROSS_ENTROPY_IGNORE_IDX]


print("torchtune", importlib.metadata.version("torchtune"))
data = [{"tokens": list(row), "labels": list(row)} for row in rows]
pack = PackedDataset(data, max_seq_len=12)[0]
batch = padded_collate_packed([pack])
packed = losses(
    batch["tokens"],
    shifted(batch["labels"]),
    mask=batch["mask"],
    input_pos=batch["input_pos"],
)
single = torch.cat([losses(torch.tensor([row]), shifted(torch.tensor([row]))) for row in rows])
kept = torch.cat([packed[0:3], packed[4:7], packed[8:11]])
print(f"targets: {len(packed)} packed, {len(single)} unpacked")
print(f"sum of losses: {packed.sum():.4f} packed, {single.sum():.4f} unpacked")
print(f"without the positions 3 and 7: {kept.sum():.4f}")
seen = (len(packed), len(single)) == (11, 9) and torch.allclose(kept, single, atol=1e-5)
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
