"""Defenses, named in a config's `defenses` mapping by their import path."""

from emarecipes.defenses.base import Defense, TrainingContext
from emarecipes.defenses.kl import KLToReference

__all__ = ["Defense", "KLToReference", "TrainingContext"]
