"""Sampling answers to question sets."""
