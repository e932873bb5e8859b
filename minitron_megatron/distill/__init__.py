"""Teacher and student on the same ranks, and what the student learns from the teacher.

Knows: two plain models, a loss over their final hidden states, and over those before. Must not know: how the student
was made, recipes.
"""

from .continuous import ContinuousObjective
from .objective import KDObjective
from .pack import is_packed
from .pairs import StatePairs
from .states import StateLoss

__all__ = ["ContinuousObjective", "KDObjective", "StateLoss", "StatePairs", "is_packed"]
