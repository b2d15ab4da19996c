"""Judges: models that are asked for a score of an answer, and what they reply."""
