"""Minitron for Megatron-Core: correct the teacher, score what matters, cut the rest, distil the loss away."""

__version__ = "0.1.0"
