"""Data sets, and the checks they pass before training."""
