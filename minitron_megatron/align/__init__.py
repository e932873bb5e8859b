"""Alignment of a distilled student: preference pairs, their losses, and answers with rewards that make new pairs.

Knows: the training loop's objectives, evaluation's engine, records of chats. Must not know: recipes, stages.
"""

from .objective import PairLoss, PreferenceObjective
from .pairing import PairsSummary, make_pairs
from .pairs import (
    PairBatch,
    PairFile,
    Reference,
    held_out_pairs,
    pair_order,
    save_arrays,
    step_pairs,
    tokenize_pairs,
)
from .reference import load_reference, measure_reference
from .rewards import REWARDS, Record, Reward
from .sampling import AnswerSettings

__all__ = [
    "REWARDS",
    "AnswerSettings",
    "PairBatch",
    "PairFile",
    "PairLoss",
    "PairsSummary",
    "PreferenceObjective",
    "Record",
    "Reference",
    "Reward",
    "held_out_pairs",
    "load_reference",
    "make_pairs",
    "measure_reference",
    "pair_order",
    "save_arrays",
    "step_pairs",
    "tokenize_pairs",
]
