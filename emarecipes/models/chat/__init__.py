"""Chat: a folder's own tokenizer and template, and the day that a template prints."""
