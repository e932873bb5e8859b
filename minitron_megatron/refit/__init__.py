"""A trimmed model and its teacher -> the same model, its linear layers repaired in closed form.

Knows: plans, plain models, activations, normal equations. Must not know: how a plan was chosen, losses, recipes.
"""

from .refit import Method, refit
from .solve import RIDGES
from .weights import SiteFit

__all__ = ["RIDGES", "Method", "SiteFit", "refit"]
