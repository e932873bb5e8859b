"""A trimmed model and its teacher -> the same model, its linear layers repaired in closed form.

Knows: plans, plain models, activations, normal equations. Must not know: how a plan was chosen, losses, recipes.
"""

from .moments import MOMENT_ROWS, MOMENT_TOKENS
from .refit import refit
from .shared import SITES, Method, SharedMoments, cut_sites, known_sites, shared_sites
from .solve import RIDGES
from .weights import SiteFit

__all__ = [
    "MOMENT_ROWS",
    "MOMENT_TOKENS",
    "RIDGES",
    "SITES",
    "Method",
    "SharedMoments",
    "SiteFit",
    "cut_sites",
    "known_sites",
    "refit",
    "shared_sites",
]
