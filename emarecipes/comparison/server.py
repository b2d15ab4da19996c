"""What the server has that each run is forked from; importing this is the server's whole work.

Frozen, as a collection in a run would go through the 500,000 objects of these imports (half a
second, and torchtune collects whenever it loads weights) and so write to, and copy, their pages.
"""

import gc

import emarecipes.comparison.run
import emarecipes.evaluation.run
import emarecipes.generation
import emarecipes.training.probe
import emarecipes.training.run  # noqa: F401
from emarecipes.models._torchtune_recipe import stock_recipe

for devices in ("single_device", "distributed"):
    stock_recipe(f"lora_finetune_{devices}")

gc.collect()
gc.freeze()
