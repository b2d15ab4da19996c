"""The training recipe: checks, batches, the loss head, the loop, what is saved."""

from emarecipes.training.run import run_cache, run_lora

__all__ = ["run_cache", "run_lora"]
