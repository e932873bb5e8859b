"""Losses between hidden states of student and teacher, summed over tokens, and a way to attach such a loss to the
backward pass of any pipeline stage. Source: Minitron, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..registry import Registry

__all__ = ["STATE_LOSSES", "attach_loss", "relation_loss", "state_loss"]

States = Float32[Tensor, "tokens hidden"]
Value = Float32[Tensor, ""]


def _cosine(student: States, teacher: States) -> Value:
    """Sum 1 - cosine similarity over tokens, as half the squared distance of the unit vectors: for nearly equal
    vectors, 1 - cosine would lose all digits in fp32."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum() / 2


def _mse(student: States, teacher: States) -> Value:
    """Sum over tokens the squared difference, averaged over channels."""
    return (student - teacher).square().mean(-1).sum()


STATE_LOSSES: Registry[Callable[[States, States], Value]] = Registry(
    "the loss on states", {"cosine": _cosine, "mse": _mse}
)
"""Name -> loss summed over tokens."""


def state_loss(
    student: Float[Tensor, "local_seq batch hidden"],
    teacher: Float[Tensor, "local_seq batch teacher_hidden"],
    counts: Bool[Tensor, "local_seq batch"],
    loss: str,
    raised: Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens teacher_hidden"]],
) -> Value:
    """Return the state loss, summed over the tokens where `counts` is true.

    raised: projects the student's states to the teacher's width.
    """
    return STATE_LOSSES[loss](raised(student[counts]).float(), teacher[counts].float())


def relation_loss(
    student: Float[Tensor, "seq batch channels"],
    teacher: Float[Tensor, "seq batch teacher_channels"],
    counts: Bool[Tensor, "seq batch"],
    heads: int,
) -> Value:
    """Return KL(teacher || student) of self-attention relations, summed over relation heads and the tokens that count.

    A token's relations are the causal softmax of scaled dot products between its vector and those of the same and
    earlier tokens, per relation head. student, teacher: the whole sequence; channels are split evenly into `heads`.
    Earlier tokens enter a row whether they count or not, as in attention. Only one head's [batch, seq, seq] tensors are
    alive at once. Source: Wang et al., MiniLMv2 (arXiv 2012.15828), section 3.
    """
    total = student.new_zeros((), dtype=torch.float32)
    for head in zip(student.chunk(heads, -1), teacher.chunk(heads, -1), strict=True):
        total = total + checkpoint(_relation, *head, counts, use_reentrant=False, preserve_rng_state=False)
    return total


def _relation(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    later = torch.ones(len(counts), len(counts), dtype=torch.bool, device=counts.device).triu(1)
    log_p, log_q = (_log_relations(vectors, later) for vectors in (student, teacher))
    rows = (log_q.exp() * (log_q - log_p)).masked_fill(later, 0.0).sum(-1)
    return rows[counts.t()].sum()


def _log_relations(
    vectors: Float[Tensor, "seq batch channels"], later: Bool[Tensor, "seq seq"]
) -> Float32[Tensor, "batch seq seq"]:
    """Return the log-softmax of scaled dot products of vectors.

    Entries of later tokens are finite, but so low that their exponential is 0.
    """
    each = vectors.float().transpose(0, 1)
    scores = each @ each.transpose(1, 2) / math.sqrt(each.shape[-1])
    return scores.masked_fill(later, torch.finfo(scores.dtype).min).log_softmax(-1)


def attach_loss(
    states: Float[Tensor, "*axes"], loss: Float[Tensor, ""], weight: Float[Tensor, "..."]
) -> Float[Tensor, "*axes"]:
    """Return `states` unchanged; their backward pass also adds the gradient of `weight * loss`.

    weight: one value, without gradient. A pipeline stage without a loss of its own can thus minimise one, as mcore does
    with the auxiliary losses of experts (transformer/moe/moe_utils.py, `MoEAuxLossAutoScaler`).
    """
    return _AttachLoss.apply(states, loss, weight)


class _Context(Protocol):
    """Autograd's context, from the forward to the backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, states: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return upstream[0], weight, None
