"""A finished adapter in another program's format: `python -m emarecipes.export`."""

from emarecipes.export.command import main

__all__ = ["main"]
