"""Alignment of a distilled student: preference pairs, their losses, and answers with rewards that make new pairs.

Knows: the training loop's objectives, evaluation's engine, records of chats. Must not know: recipes, stages.
"""

from .pairing import PairsSummary, make_pairs
from .rewards import REWARDS, Record, Reward
from .sampling import AnswerSettings

__all__ = [
    "REWARDS",
    "AnswerSettings",
    "PairsSummary",
    "Record",
    "Reward",
    "make_pairs",
]
