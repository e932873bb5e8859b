"""Scores -> Plan -> a smaller model, its shards cut in place.

Knows: scores, plans, shards. Must not know: how scores were made, losses, Hugging Face.
"""

from .baselines import first_plan, random_plan
from .choose import SAFE_MARGIN, check_sizes, choose
from .depth import choose_layers
from .trim import trim

__all__ = ["SAFE_MARGIN", "check_sizes", "choose", "choose_layers", "first_plan", "random_plan", "trim"]
