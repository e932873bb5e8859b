"""Divergence over the teacher's top-k vocabulary entries of each token, found over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from ..parallel import gather_sequence
from .divergences import Divergence, Logits, PerToken
from .vocab import Vocabulary

__all__ = ["LIVE_KEYS", "Shortlist", "over_shortlist"]

LIVE_KEYS = 5
"""Number of tensors of the logits' size alive while the entries are found, both models' logits included."""


@dataclass(frozen=True)
class Shortlist:
    """`size` entries per token, all of them present on every rank (implements `Entries`)."""

    size: int
    ranks: int = 1

    def log_softmax_(self, *logits: Logits) -> None:
        for each in logits:
            each.copy_(each.log_softmax(-1))

    def total(self, part: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
        return part


def over_shortlist(
    divergence: Divergence, student: Logits, teacher: Logits, size: int, vocabulary: Vocabulary, start: int
) -> tuple[PerToken, Logits]:
    """Return the divergence over the teacher's `size` likeliest entries of each token; both softmaxes cover only these.

    Arguments and results as for a divergence; `start` is this rank's first entry. Every rank computes the whole value
    and returns 1 / ranks of it, with the gradient of its own entries.
    """
    entry = likeliest(teacher, size, vocabulary, start)
    token, place = ((entry >= start) & (entry < start + student.shape[1])).nonzero(as_tuple=True)
    own = (token, entry[token, place] - start)
    both = torch.zeros(2, *entry.shape, device=student.device)
    both[0, token, place], both[1, token, place] = student[own], teacher[own]
    student_best, teacher_best = vocabulary.total(both)
    value, gradient = divergence(student_best, teacher_best, Shortlist(size))
    student.zero_()[own] = gradient[token, place]
    return value / vocabulary.ranks, student


def likeliest(logits: Logits, size: int, vocabulary: Vocabulary, start: int) -> Int64[Tensor, "chunk size"]:
    """Return the entries with the `size` largest logits of each token, largest first, on every rank.

    Ties, frequent in bf16, go to the lower entry. Collective over the vocabulary's group.
    """
    keys = _keys(logits, start)
    best = keys.topk(min(size, keys.shape[1])).values
    if best.shape[1] < size:
        best = torch.nn.functional.pad(best, (0, size - best.shape[1]), value=torch.iinfo(torch.int64).min)
    if vocabulary.ranks > 1:
        every = gather_sequence(best, vocabulary.group).view(vocabulary.ranks, *best.shape)
        best = every.transpose(0, 1).flatten(1).topk(size).values
    return LAST - (best & LAST)


LAST = 2**32 - 1


def _keys(logits: Logits, start: int) -> Int64[Tensor, "chunk entries"]:
    """Return distinct sort keys: the rank order of the fp32 logit in the upper 32 bits, the inverted
    entry number in the lower ones."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # integers in the order of the floats
    del bits
    inverted = LAST - torch.arange(start, start + logits.shape[1], device=logits.device)
    return order.long().bitwise_left_shift_(32).bitwise_or_(inverted)
