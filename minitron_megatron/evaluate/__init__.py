"""How good a model is on text that it was not trained on.

Knows: models, held-out batches. Must not know: how a model came about, recipes.
"""

from .losses import ValidationSet, validation_loss

__all__ = ["ValidationSet", "validation_loss"]
