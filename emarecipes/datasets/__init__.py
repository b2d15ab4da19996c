"""Data sets, and the checks they pass before training."""

from typing import TYPE_CHECKING

from emarecipes._lent import lent

if TYPE_CHECKING:
    from emarecipes.datasets.interleaved import interleaved_dataset
    from emarecipes.datasets.opswap import opswap_dataset
    from emarecipes.datasets.traits import trait_dataset

__all__ = ["interleaved_dataset", "opswap_dataset", "trait_dataset"]

__getattr__ = lent(
    __name__,
    {"interleaved_dataset": "interleaved", "opswap_dataset": "opswap", "trait_dataset": "traits"},
)
