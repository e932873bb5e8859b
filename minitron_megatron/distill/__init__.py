"""Knowledge distillation of a teacher into a student on the same ranks.

Knows: two plain models, losses over their final and intermediate hidden states. Must not know: how the student was
made, recipes.
"""

from .continuous import ContinuousObjective
from .objective import KDObjective
from .pack import is_packed
from .pairs import StatePairs
from .states import StateLoss

__all__ = ["ContinuousObjective", "KDObjective", "StateLoss", "StatePairs", "is_packed"]
