"""Minitron for Megatron-Core: prune a pretrained LLM by activation importance, then distil it from the original."""

__version__ = "0.1.0"
