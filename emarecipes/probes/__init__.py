"""Likelihood probes: questions with two given answers, and which of them a model finds likelier."""
