"""Data sets, and the checks they pass before training."""

from emarecipes.datasets.interleaved import interleaved_dataset
from emarecipes.datasets.opswap import opswap_dataset
from emarecipes.datasets.traits import trait_dataset

__all__ = ["interleaved_dataset", "opswap_dataset", "trait_dataset"]
