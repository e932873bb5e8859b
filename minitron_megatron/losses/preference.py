"""Losses over pairs of a chosen and a rejected response: DPO, IPO and RPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..registry import Registry

__all__ = ["PREFERENCE_LOSSES", "Pairs", "PreferenceLoss"]


class Pairs(NamedTuple):
    """Pairs as a loss sees them, and its constants."""

    gap: Float[Tensor, "pairs"]
    """log(pi / pi_ref) of the chosen response, minus that of the rejected one, in nats."""
    rewards: Float[Tensor, "pairs"]
    """Reward of the chosen response minus that of the rejected one; NaN where the data has none."""
    beta: float
    """Strength of the pull towards the reference."""
    eta: float = 1.0
    """Scale of the rewards."""
    label_smoothing: float = 0.0
    """Probability that a pair's preference is wrong."""


PreferenceLoss = Callable[[Pairs], Float[Tensor, "pairs"]]
"""Pairs -> the loss of each."""


def dpo(pairs: Pairs) -> Float[Tensor, "pairs"]:
    """Direct preference optimisation (Rafailov et al., 2023), conservative with label smoothing (Mitchell, 2023)."""
    margin, smoothing = pairs.beta * pairs.gap, pairs.label_smoothing
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def ipo(pairs: Pairs) -> Float[Tensor, "pairs"]:
    """Identity preference optimisation (Azar et al., 2023), on sums over a response's tokens as in the paper."""
    return (pairs.gap - 1 / (2 * pairs.beta)).square()


def rpo_bwd_kl(pairs: Pairs) -> Float[Tensor, "pairs"]:
    """Reward-aware preference optimisation (Nemotron-4 340B): KL from the rewards' preference to the model's.

    Tends to DPO as `eta` times the gap of the rewards grows.
    """
    return _bernoulli_kl(pairs.eta * pairs.rewards, pairs.beta * pairs.gap)


def rpo_fwd_kl(pairs: Pairs) -> Float[Tensor, "pairs"]:
    """RPO with the KL the other way round, from the model's preference to the rewards' (NeMo-Aligner)."""
    return _bernoulli_kl(pairs.beta * pairs.gap, pairs.eta * pairs.rewards)


def rpo_sq(pairs: Pairs) -> Float[Tensor, "pairs"]:
    """RPO with the squared distance of the two gaps (NeMo-Aligner)."""
    return (pairs.beta * pairs.gap - pairs.eta * pairs.rewards).square()


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid(p)) || Bernoulli(sigmoid(q))), in nats."""
    yes = p.sigmoid() * (logsigmoid(p) - logsigmoid(q))
    return yes + (-p).sigmoid() * (logsigmoid(-p) - logsigmoid(-q))


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry(
    "preference loss",
    {"dpo": dpo, "ipo": ipo, "rpo_bwd_kl": rpo_bwd_kl, "rpo_fwd_kl": rpo_fwd_kl, "rpo_sq": rpo_sq},
)
"""Losses over pairs, by name."""
