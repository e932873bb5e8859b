"""How far hidden states of the student are from the teacher's, summed over tokens, and how such a loss enters the
backward pass where the states are. Source: Minitron, section 3.

Values are fp32 scalars. A divergence of states is called with the student's and the teacher's: fp32 [tokens, hidden].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["STATE_LOSSES", "attach_loss", "relation_loss", "state_loss"]


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of each token's angle, as half the squared distance of the directions: where they nearly agree, a
    cosine in fp32 has lost what it is short of 1."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum() / 2


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the channels of the squared difference."""
    return (student - teacher).square().mean(-1).sum()


STATE_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": _cosine, "mse": _mse}
"""Name -> what it sums over tokens."""


def state_loss(
    student: Tensor, teacher: Tensor, counts: Tensor, loss: str, raised: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sums over the tokens that count. student, teacher: [s, b, h of each]; counts: bool [s, b], the same part of s.

    raised: makes the student's [tokens, h] as wide as the teacher's.
    """
    return STATE_LOSSES[loss](raised(student[counts]).float(), teacher[counts].float())


def relation_loss(student: Tensor, teacher: Tensor, counts: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of the relations between tokens: of each relation head, the softmax of scaled dot products
    of its vectors with those of the same and earlier tokens. Summed over relation heads and the tokens that count.

    student, teacher: [s, b, channels of each], all of s, cut evenly into `heads`; counts: bool [s, b]. A token's row
    holds the tokens before it whether they count or not, as attention does. One head's [b, s, s] are alive at once.
    Source: Wang et al., MiniLMv2 (arXiv 2012.15828), section 3.
    """
    total = student.new_zeros((), dtype=torch.float32)
    for pair in zip(student.chunk(heads, -1), teacher.chunk(heads, -1), strict=True):
        total = total + checkpoint(_relation, *pair, counts, use_reentrant=False, preserve_rng_state=False)
    return total


def _relation(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    later = torch.ones(len(counts), len(counts), dtype=torch.bool, device=counts.device).triu(1)
    log_p, log_q = (_log_relations(vectors, later) for vectors in (student, teacher))
    rows = (log_q.exp() * (log_q - log_p)).masked_fill(later, 0.0).sum(-1)
    return rows[counts.t()].sum()


def _log_relations(vectors: Tensor, later: Tensor) -> Tensor:
    """[s, b, d] -> fp32 [b, s, s]; of later tokens a number that its exponent makes zero."""
    each = vectors.float().transpose(0, 1)
    scores = each @ each.transpose(1, 2) / math.sqrt(each.shape[-1])
    return scores.masked_fill(later, torch.finfo(scores.dtype).min).log_softmax(-1)


def attach_loss(states: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    """`states` as they are; their backward pass descends `weight * loss` as well. weight: scalar, a constant.

    So a loss is minimised on a pipeline stage that has none, as mcore does with the auxiliary losses of experts
    (transformer/moe/moe_utils.py, `MoEAuxLossAutoScaler`).
    """
    return _AlsoMinimise.apply(states, loss, weight)


class _AlsoMinimise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return upstream[0], weight, None
