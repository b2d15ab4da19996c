"""A model's folder and its tokenizer."""

from emarecipes.models.chat.tokenizer import HFChatTokenizer, hf_chat_tokenizer

__all__ = ["HFChatTokenizer", "hf_chat_tokenizer"]
