"""Training objective: a loss over pairs of a chosen and a rejected response."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..data import Batch
from ..losses import PREFERENCE_LOSSES, Output, Pairs, Vocabulary, sample_likelihood
from ..model import Chunk, output_weight, shape_of
from ..parallel import Topology, all_reduce, sum_over_world
from ..settings import AfterValidator, Field, NotNegative, Positive, Settings
from ..train import Objective
from .pairs import PairBatch

__all__ = ["PairLoss", "PreferenceObjective"]


class PairLoss(Settings):
    """Loss over pairs, and its constants."""

    loss: Annotated[str, AfterValidator(PREFERENCE_LOSSES.known), Field(examples=[*PREFERENCE_LOSSES])] = "dpo"
    """Loss over pairs: `dpo` or `ipo`; with rewards `rpo_bwd_kl`, `rpo_fwd_kl` or `rpo_sq`."""
    beta: Positive = 0.2
    """Strength of the pull towards the model that the round starts from."""
    eta: Positive = 1.0
    """Scale of the rewards of the data. Only for RPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's preference is wrong (conservative DPO). Only for `dpo`."""
    sft_weight: NotNegative = 0.0
    """Weight of an added -log p of the chosen response, in nats per response."""


class PreferenceObjective(Objective):
    """A loss over pairs, averaged over pairs. A response's likelihood is the sum over its tokens, not the mean.

    `finish` returns averages over the pairs since the last call: `preference_accuracy`, the share whose chosen response
    gained more against the reference; `preference_margin`, beta x the difference of the gains; `chosen_gain` and
    `rejected_gain`, log(pi / pi_ref) in nats; `kl_to_reference`, minus the mean gain: an unbiased estimate of
    KL(reference || model) in nats per response if the reference wrote the responses; and `reward_gap`, if there are
    rewards.
    """

    unit = "pairs"
    _names = ("preference_accuracy", "preference_margin", "chosen_gain", "rejected_gain", "kl_to_reference")

    def __init__(self, topology: Topology, keys: PairLoss) -> None:
        self.topology, self.keys = topology, keys
        self._sums = self._zeros()

    def loss(self, chunk: Chunk, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        assert isinstance(batch, PairBatch)
        keys, weights = self.keys, batch.real.double()
        likelihoods = response_likelihoods(chunk, hidden, batch, self.topology)
        gains, rewards = likelihoods - batch.reference, batch.rewards[:, 0] - batch.rewards[:, 1]
        pairs = Pairs(gains[:, 0] - gains[:, 1], rewards, keys.beta, keys.eta, keys.label_smoothing)
        losses = PREFERENCE_LOSSES[keys.loss](pairs) - keys.sft_weight * likelihoods[:, 0]
        total = losses @ weights
        if (
            not batch.is_first_shard
        ):  # of ranks that share sequences, each has its part of the gradient, the first one the value
            return (total - total.detach()).float()
        self._measure(gains.detach(), rewards, weights)
        return total.float()

    def _measure(self, gains: Tensor, rewards: Tensor, weights: Tensor) -> None:
        gap = gains[:, 0] - gains[:, 1]
        values = ((gap > 0).double(), self.keys.beta * gap, gains[:, 0], gains[:, 1], -gains.mean(1), rewards)
        self._sums += weights @ torch.stack([torch.ones_like(gap), *values], 1)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._names) + 2, dtype=torch.float64, device=self.topology.device)

    def finish(self) -> dict[str, float]:
        counted = self.topology.is_last_stage and self.topology.tp_rank == 0
        sums = sum_over_world(self._sums if counted else self._zeros())
        self._sums = self._zeros()
        count, *totals = sums.tolist()
        means = {name: total / max(count, 1) for name, total in zip((*self._names, "reward_gap"), totals, strict=True)}
        return {name: mean for name, mean in means.items() if mean == mean}  # NaN: no rewards


def response_likelihoods(chunk: Chunk, hidden: Tensor, batch: PairBatch, topology: Topology) -> Tensor:
    """Return log p of the responses, in nats: float64 [pairs, 2].

    Last pipeline stage only. Collective over the ranks that split the vocabulary or share the sequences.
    """
    vocabulary = Vocabulary(shape_of(chunk).vocab, topology.tp_group, topology.sequence_parallel)
    output = Output(hidden, output_weight(chunk))
    own = sample_likelihood(output, batch.labels, batch.mask, vocabulary).double()
    if shard := batch.attention_context and batch.attention_context.shard:
        whole = all_reduce(own.detach().clone(), shard.group)
        own = own + (whole - own.detach())
    return own.view(-1, 2)
