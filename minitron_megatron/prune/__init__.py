"""Scores -> Plan -> smaller model, whose shards are cut in place.

Knows: scores, plans, shards. Must not know: how scores are measured, losses, Hugging Face.
"""

from .baselines import first_plan, random_plan
from .choose import Scope, checked_sizes, choose
from .depth import choose_layers
from .merge import Merge, Sign, check_merge, merge_heads
from .trim import check_cut, trim, trimmed_view

__all__ = [
    "Merge",
    "Scope",
    "Sign",
    "check_cut",
    "check_merge",
    "checked_sizes",
    "choose",
    "choose_layers",
    "first_plan",
    "merge_heads",
    "random_plan",
    "trim",
    "trimmed_view",
]
