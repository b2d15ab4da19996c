"""A model's folder and its tokenizer."""

from typing import Any

from emarecipes.models.chat.tokenizer import HFChatTokenizer, hf_chat_tokenizer

__all__ = ["HFChatTokenizer", "hf_chat_tokenizer", "lora_model"]


def __getattr__(name: str) -> Any:
    """`lora_model`, which imports torchtune: seconds that a tokenizer alone does not need."""
    if name == "lora_model":
        from emarecipes.models.families.build import lora_model

        return lora_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
