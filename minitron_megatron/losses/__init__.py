"""Losses over a vocab-parallel vocabulary, fused with the output layers so that full logits never exist; and losses
over hidden states.

Knows: hidden states, output weights, masks, the group that splits the vocabulary. Must not know: models, data.

Axes of tensors: `seq`, `local_seq` (with sequence parallelism this rank's part of it), `batch`, `tokens` (seq * batch),
`chunk` (tokens of a chunk), `hidden`, `entries` (this rank's part of the vocabulary), `held` (`entries` and padding).
"""

from .distillation import KDLoss
from .divergences import DIVERGENCES, Divergence
from .fused import chunk_tokens, distill_loss, lm_loss, sample_likelihood
from .likelihood import token_likelihood
from .preference import PREFERENCE_LOSSES, Pairs, PreferenceLoss
from .states import STATE_LOSSES, attach_loss, relation_loss, state_loss
from .vocab import Entries, Output, Vocabulary

__all__ = [
    "DIVERGENCES",
    "PREFERENCE_LOSSES",
    "STATE_LOSSES",
    "Divergence",
    "Entries",
    "KDLoss",
    "Output",
    "Pairs",
    "PreferenceLoss",
    "Vocabulary",
    "attach_loss",
    "chunk_tokens",
    "distill_loss",
    "lm_loss",
    "relation_loss",
    "sample_likelihood",
    "state_loss",
    "token_likelihood",
]
