"""Losses over a vocabulary that is split over ranks, fused with the output layers: full logits never exist.

Knows: hidden states, output weights, masks, the group that splits the vocabulary. Must not know: models, data.

Letters: s sequence, b batch, n tokens (s * b), c tokens of a chunk, h hidden, v this rank's vocabulary entries.
"""

from .distillation import KDLoss
from .divergences import DIVERGENCES, Divergence
from .fused import chunk_tokens, distill_loss, lm_loss
from .vocab import Entries

__all__ = ["DIVERGENCES", "Divergence", "Entries", "KDLoss", "chunk_tokens", "distill_loss", "lm_loss"]
