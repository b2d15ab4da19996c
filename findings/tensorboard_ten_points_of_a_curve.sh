#!/usr/bin/env bash
# torch 2.14.1's SummaryWriter with new_style=True, as torchtune logs, and tensorboard 2.21.0's
# EventAccumulator: of a curve of 100 steps ten are read back, at random places. Written in the old
# style, all 100.
#
# Expected: the same points for the same scalars. (A guess beforehand: ten, the last ones.)
# Seen: the new style is a tensor to the reader, Scalars() does not know the tag, and Tensors() holds a
# sample of ten steps, of which the last is one; no warning. size_guidance={"tensors": 0} reads all.
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.14.1" "tensorboard==2.21.0" numpy setuptools
cat >"$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

for name in ("torch", "tensorboard"):
    print(name, importlib.metadata.version(name))
with tempfile.TemporaryDirectory() as folder:
    with SummaryWriter(folder) as writer:
        for step in range(100):
            writer.add_scalar("new", 1 / (step + 1), step, new_style=True)
            writer.add_scalar("old", 1 / (step + 1), step)
    reader = EventAccumulator(folder)
    reader.Reload()
    new = [event.step for event in reader.Tensors("new")]
    old = [event.step for event in reader.Scalars("old")]
    whole = EventAccumulator(folder, size_guidance={"tensors": 0})
    whole.Reload()
    print("tags:", {kind: tags for kind, tags in reader.Tags().items() if tags})
    print(f"old style: {len(old)} steps; new style: {new}")
    print("new style with size_guidance:", len(whole.Tensors("new")))
    seen = len(old) == 100 and len(new) == 10 and new != list(range(90, 100))
    seen = seen and new[-1] == 99 and len(whole.Tensors("new")) == 100
sys.exit(0 if seen else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
