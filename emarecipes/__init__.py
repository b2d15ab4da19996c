"""Defenses against emergent misalignment inside torchtune's LoRA fine-tuning."""

__version__ = "0.1.0"
