"""A model's folder and its tokenizer."""

from emarecipes.models.tokenizer import HFChatTokenizer, hf_chat_tokenizer

__all__ = ["HFChatTokenizer", "hf_chat_tokenizer"]
