"""How likely given tokens are, and whether they are the likeliest: no gradients, no full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import Group, all_reduce
from .vocab import Vocabulary

__all__ = ["token_likelihood"]

BUDGET = 64 * 2**20
"""Bytes of this rank's logits at a time."""


@torch.no_grad()
def token_likelihood(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden: [n, h]; weight: this rank's rows of the output layer; labels: int64 [n]. Collective over the group.

    Returns log p(label) in nats: fp32 [n], whether no entry is likelier: bool [n], and the likeliest entry, of equals
    the first: int64 [n].
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
    mine = ((at >= 0) & (at < logits.shape[1])).nonzero().flatten()
    likelihood = logits.new_zeros(len(logits)).index_put_((mine,), logits[mine, at[mine]])
    best, place = logits.max(-1) if logits.shape[1] else (logits.new_full((len(logits),), -torch.inf), labels * 0)
    highest = all_reduce(best.clone(), vocabulary.group, "max")
    first = torch.where(best == highest, -(place + start), -vocabulary.size)  # the least place is the largest negative
    return all_reduce(likelihood, vocabulary.group), -all_reduce(first, vocabulary.group, "max")
