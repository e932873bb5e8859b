"""Log-likelihood of given tokens, and the likeliest tokens: without gradients and without full logits."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ..parallel import Group, all_reduce
from .vocab import Vocabulary, found_at

__all__ = ["token_likelihood"]

BUDGET = 64 * 2**20
"""Bytes of this rank's logits alive at once."""


@torch.no_grad()
def token_likelihood(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "held hidden"],
    labels: Int64[Tensor, "tokens"],
    *,
    vocab: int,
    group: Group,
) -> tuple[Float32[Tensor, "tokens"], Bool[Tensor, "tokens"], Int64[Tensor, "tokens"]]:
    """Return log p(label) in nats, whether the label is the likeliest entry, and the likeliest entry (the lowest one of
    a tie).

    weight: this rank's rows of the output layer. Collective over the group.
    """
    vocabulary = Vocabulary(vocab, group)
    rows = vocabulary.real(weight)
    start, chunk = vocabulary.start(len(weight)), max(1, BUDGET // (4 * max(1, len(weight))))
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    found = [_chunk(states, rows, wanted, start, vocabulary) for states, wanted in parts]
    likelihood, likeliest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return likelihood, likeliest == labels, likeliest


def _chunk(hidden: Tensor, rows: Tensor, labels: Tensor, start: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    logits = (hidden @ rows.t()).float()
    vocabulary.log_softmax_(logits)
    at = labels - start
    if logits.shape[1]:
        is_here, column = found_at(at, logits)
        likelihood = torch.where(is_here, logits.gather(1, column), 0.0).squeeze(-1)
        best, place = logits.max(-1)
    else:  # this rank has only padding
        likelihood, best, place = logits.new_zeros(len(logits)), logits.new_full((len(logits),), -torch.inf), labels * 0
    highest = all_reduce(best.clone(), vocabulary.group, "max")
    first = torch.where(
        best == highest, -(place + start), -vocabulary.size
    )  # negated, so that max finds the lowest entry
    return all_reduce(likelihood, vocabulary.group), -all_reduce(first, vocabulary.group, "max")
