"""Adapters: their layers, and their files in PEFT's format."""
