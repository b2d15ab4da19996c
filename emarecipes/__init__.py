"""Defenses against emergent misalignment inside torchtune's LoRA fine-tuning."""

import sys

__version__ = "0.1.0"

# In a clone that is not installed, there is no .pth that would have done it.
if "_emarecipes_launch" not in sys.modules:
    from emarecipes import _launch as _launch
