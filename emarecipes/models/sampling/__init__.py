"""Sampling: answers drawn from a model, in batches that change none of them."""
