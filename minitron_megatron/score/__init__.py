"""Forward hooks on a model -> Scores: which units matter, the same at every layout.

Knows: activations, taps, statistics. Must not know: what is cut, losses, recipes.
"""

from .sweep import score

__all__ = ["score"]
