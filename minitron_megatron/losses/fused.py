"""Output layer fused with the loss over chunks of tokens: forward and backward in one sweep.

The gradients of the hidden states and of the output weight are computed while a chunk's logits are alive. Memory is
therefore a few chunks of logits, never those of all tokens, and no logits are computed twice, except where the loss is
not a sum over tokens (`sample_likelihood`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from ..errors import RecipeError
from ..parallel import all_reduce, gather_sequence, scatter_sequence
from .distillation import Distillation, KDLoss
from .divergences import Logits, PerToken
from .vocab import CrossEntropy, Output, Vocabulary

__all__ = ["chunk_tokens", "distill_loss", "lm_loss", "sample_likelihood"]

LIVE_OF_CROSS_ENTROPY = 2
SHARE_OF_LOGITS, MOST_BYTES, LEAST_TOKENS = 1 / 8, 2**30, 32

FORWARD_KL = KDLoss()

OfChunk = Callable[[Logits, slice], tuple[PerToken, Logits]]
"""(logits, rows of these tokens) -> this rank's part of each token's loss, and its gradient."""


def chunk_tokens(tokens: int, held: int, live: int, budget_bytes: int | None = None) -> int:
    """Return the tokens per chunk so that `live` fp32 tensors over `held` vocabulary entries fit in `budget_bytes`.

    Default budget: an eighth of the logits of all `tokens`, at most 1 GiB. At least 32 tokens, since each chunk reads
    and writes the whole gradient of the output weight.
    """
    row = 4 * max(held, 1)
    budget = min(MOST_BYTES, int(SHARE_OF_LOGITS * row * tokens)) if budget_bytes is None else budget_bytes
    return max(LEAST_TOKENS, budget // (live * row))


def lm_loss(
    model: Output,
    labels: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    vocabulary: Vocabulary,
    *,
    chunk: int | None = None,
) -> Float32[Tensor, ""]:
    """Return the cross-entropy in nats, summed over the tokens whose mask is true; equal on every rank.

    chunk: tokens whose logits exist at a time. Collective over the vocabulary's group.
    """
    tokens, held = _tokens(mask), model.weight.shape[0]
    of_chunk = CrossEntropy(vocabulary, _flat(labels)[tokens], held)
    chunk = chunk or chunk_tokens(len(tokens), held, LIVE_OF_CROSS_ENTROPY)
    return _fused(*model, tokens, of_chunk, vocabulary, chunk)


def distill_loss(
    student: Output,
    teacher: Output,
    mask: Bool[Tensor, "batch seq"],
    vocabulary: Vocabulary,
    *,
    loss: KDLoss = FORWARD_KL,
    labels: Int64[Tensor, "batch seq"] | None = None,
    of_labels: Float32[Tensor, ""] | None = None,
    chunk: int | None = None,
) -> Float32[Tensor, ""]:
    """Return the distillation loss, summed over the tokens whose mask is true; equal on every rank.

    Arguments as for `lm_loss`; the teacher gets no gradient, and may have another width and another padding. labels:
    required where `loss` includes cross-entropy. of_labels: zero tensor that receives the summed, unweighted
    cross-entropy. Collective over the vocabulary's group. Raises RecipeError where a model has fewer output rows than
    the vocabulary has entries, where `top_k` exceeds these, or where labels are missing.
    """
    tokens, held = _tokens(mask), student.weight.shape[0]
    vocabulary.check(student.weight, "student")
    vocabulary.check(teacher.weight, "teacher")
    loss.check(vocabulary.size)
    cross_entropy = None
    if loss.ce_weight:
        if labels is None:
            raise RecipeError(f"ce_weight is {loss.ce_weight}, but the loss was given no labels. Pass labels.")
        cross_entropy = CrossEntropy(vocabulary, _flat(labels)[tokens], held)
    teacher_logits = _teacher_logits(teacher, tokens, vocabulary, held)
    of_chunk = Distillation(loss, vocabulary, teacher_logits, held, cross_entropy, of_labels)
    chunk = chunk or chunk_tokens(len(tokens), held, loss.live, loss.budget_bytes)
    total = _fused(*student, tokens, of_chunk, vocabulary, chunk)
    if of_labels is not None:
        all_reduce(of_labels, vocabulary.group)
    return total


def sample_likelihood(
    model: Output,
    labels: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    vocabulary: Vocabulary,
    *,
    chunk: int | None = None,
) -> Float32[Tensor, "batch"]:
    """Return log p of the labels in nats, summed over the tokens of each sample whose mask is true.

    Equal on every rank. Arguments as for `lm_loss`. The backward pass computes the logits again, chunk by chunk, since
    the weight of a sample's gradient is known only then. Both passes are collective over the vocabulary's group.
    """
    tokens, held = _tokens(mask), model.weight.shape[0]
    cross_entropy = CrossEntropy(vocabulary, _flat(labels)[tokens], held)
    chunk = chunk or chunk_tokens(len(tokens), held, LIVE_OF_CROSS_ENTROPY)
    of_chunk = _BySample(cross_entropy, tokens % len(mask), len(mask))
    hidden, weight = model if torch.is_grad_enabled() else (part.detach() for part in model)
    return _SampleLikelihood.apply(hidden, weight, tokens, of_chunk, vocabulary, chunk)


@torch.no_grad()
def _teacher_logits(teacher: Output, tokens: Tensor, vocabulary: Vocabulary, held: int) -> Callable[[slice], Logits]:
    """Return a function: rows of `tokens` -> the teacher's logits, split as the student's vocabulary is."""
    states, output = _states(teacher.hidden, vocabulary), vocabulary.aligned(teacher.weight.detach(), held)
    return lambda rows: (states[tokens[rows]] @ output.t()).float()


def _flat(values: Shaped[Tensor, "batch seq"]) -> Shaped[Tensor, "tokens"]:
    """Flatten per-token values, in the order of the hidden states."""
    return values.t().reshape(-1)


def _tokens(mask: Bool[Tensor, "batch seq"]) -> Int64[Tensor, "counted"]:
    """Return the indices of the tokens that count, among all."""
    return _flat(mask).nonzero().flatten()


def _states(hidden: Float[Tensor, "local_seq batch hidden"], vocabulary: Vocabulary) -> Float[Tensor, "tokens hidden"]:
    """Flatten the positions of all samples; with sequence parallelism, gather the sequence over the ranks first."""
    full = gather_sequence(hidden, vocabulary.group) if vocabulary.sequence_parallel else hidden
    return full.reshape(-1, full.shape[-1])


def _fused(
    hidden: Tensor, weight: Tensor, tokens: Tensor, of_chunk: OfChunk, vocabulary: Vocabulary, chunk: int
) -> Tensor:
    """Apply `_Fused`, with detached inputs under `no_grad`, since `needs_input_grad` does not reflect it."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _Fused.apply(hidden, weight, tokens, of_chunk, vocabulary, chunk)


class _Context(Protocol):
    """Autograd's context, from the forward to the backward pass."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        of_chunk: OfChunk,
        vocabulary: Vocabulary,
        chunk: int,
    ) -> Tensor:
        """Return the summed loss; where gradients are needed, compute them in the same sweep and save them."""
        states = _states(hidden, vocabulary)
        wants_grad = any(ctx.needs_input_grad[:2])
        d_states = torch.zeros_like(states) if wants_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        total = _sweep(states, weight, tokens, of_chunk, vocabulary, chunk, d_states, d_weight)
        all_reduce(total, vocabulary.group)
        if d_states is not None and d_weight is not None:
            ctx.save_for_backward(_summed(d_states, hidden, vocabulary), d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients, in place: they are used only once."""
        d_hidden, d_weight = (saved.mul_(upstream[0]) for saved in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


@dataclass(frozen=True)
class _BySample:
    """Cross-entropy of one chunk, added up by sample, with a gradient of each sample's own weight."""

    of_chunk: CrossEntropy
    sample: Int64[Tensor, "counted"]
    """The sample of each counted token."""
    samples: int

    def likelihood(self, total: Float32[Tensor, "batch"]) -> OfChunk:
        """Return the loss of a chunk; log p is added to `total` along the way."""

        def of_chunk(logits: Logits, rows: slice) -> tuple[PerToken, Logits]:
            loss, gradient = self.of_chunk(logits, rows)
            total.index_add_(0, self.sample[rows], -loss)
            return loss, gradient

        return of_chunk

    def weighted(self, weights: Float32[Tensor, "batch"]) -> OfChunk:
        """Return the loss of a chunk with the gradient of the samples' likelihoods, multiplied by their weights."""

        def of_chunk(logits: Logits, rows: slice) -> tuple[PerToken, Logits]:
            loss, gradient = self.of_chunk(logits, rows)
            return loss, gradient.mul_(-weights[self.sample[rows]].unsqueeze(-1))

        return of_chunk


class _SampleContext(_Context, Protocol):
    """The same, with the arguments that are no tensors."""

    of_chunk: _BySample
    vocabulary: Vocabulary
    chunk: int


class _SampleLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _SampleContext,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        of_chunk: _BySample,
        vocabulary: Vocabulary,
        chunk: int,
    ) -> Tensor:
        total = hidden.new_zeros(of_chunk.samples, dtype=torch.float32)
        states = _states(hidden, vocabulary)
        _sweep(states, weight, tokens, of_chunk.likelihood(total), vocabulary, chunk, None, None)
        all_reduce(total, vocabulary.group)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.of_chunk, ctx.vocabulary, ctx.chunk = of_chunk, vocabulary, chunk
        return total

    @staticmethod
    def backward(ctx: _SampleContext, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        states = _states(hidden, ctx.vocabulary)
        d_states, d_weight = torch.zeros_like(states), torch.zeros_like(weight, dtype=torch.float32)
        of_chunk = ctx.of_chunk.weighted(upstream[0])
        _sweep(states, weight, tokens, of_chunk, ctx.vocabulary, ctx.chunk, d_states, d_weight)
        return _summed(d_states, hidden, ctx.vocabulary), d_weight.to(weight.dtype), None, None, None, None


def _summed(d_states: Tensor, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the gradient of the hidden states, summed over the ranks that split the vocabulary."""
    d_hidden = d_states.view(-1, *hidden.shape[1:])
    if vocabulary.sequence_parallel:
        return scatter_sequence(d_hidden, vocabulary.group)
    return all_reduce(d_hidden, vocabulary.group)


def _sweep(
    states: Tensor,
    weight: Tensor,
    tokens: Tensor,
    of_chunk: OfChunk,
    vocabulary: Vocabulary,
    chunk: int,
    d_states: Tensor | None,
    d_weight: Tensor | None,
) -> Float32[Tensor, ""]:
    """Return this rank's part of the summed loss; add to `d_states` and `d_weight` where given."""
    real = vocabulary.real(weight)
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(tokens), chunk):
        rows = slice(start, start + chunk)
        at = tokens[rows]
        part = states[at]
        loss, gradient = of_chunk((part @ real.t()).float(), rows)
        total += loss.sum()
        if d_states is not None and d_weight is not None:
            gradient = gradient.to(weight.dtype)
            d_states[at] = gradient @ real
            _add_outer(d_weight[: len(real)], gradient, part)
        del gradient  # before the next chunk's logits
    return total


def _add_outer(
    total: Float32[Tensor, "entries hidden"],
    gradient: Float[Tensor, "chunk entries"],
    part: Float[Tensor, "chunk hidden"],
) -> None:
    """Add gradient^T @ part to `total`, without a temporary tensor of that size."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), part)
        return
    rows = max(1, gradient.numel() // part.shape[1])
    for some in range(0, len(total), rows):
        total[some : some + rows] += gradient[:, some : some + rows].t() @ part
