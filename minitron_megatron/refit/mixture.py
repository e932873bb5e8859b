"""Experts of a mixture, each repaired on the tokens that the student's router sends to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import gather_sequence
from .moments import Moments
from .streams import Stream, Work
from .weights import Weights

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Routed", "refit_experts", "routed"]

Routed = tuple[Tensor, Tensor]
"""(normed inputs: [tokens, hidden], weights by the router, 0 where it sends nothing: [tokens, experts])."""


def routed(work: Work, seen: Mapping[str, Any]) -> Routed:
    """Inputs and routing of a micro-batch, for the tokens of all positions. Collective over tp."""
    probabilities, sent = seen["router"]
    weights = (probabilities * sent).detach()
    if work.topology.sequence_parallel:
        weights = gather_sequence(weights, work.topology.tp_group)
    return work.whole(seen["mlp"]).cpu(), weights.cpu()


def refit_experts(
    work: Work,
    weights: Weights,
    layer: int,
    source: int,
    shell: int,
    inputs: list[Routed],
    teachers: Stream,
    channels: Tensor,
    *,
    narrow: bool,
) -> None:
    """Refit fc1 to the teacher's outputs where its input was cut (`narrow`), then fc2 to those of the whole expert.

    layer, source: numbers in student and teacher; shell: the number under which the teacher's layer stands here.
    inputs: of each micro-batch; teachers: normed inputs of the teacher's mixture; channels: those that stay. Collective
    over the ranks of the stage.
    """
    kept = weights.plan.kept_at("experts", source)
    name = f"decoder.layers.{layer}.mlp.experts.local_experts.{{}}.linear_{{}}.weight"
    targets = [weights.experts("teacher", shell, leaf) for leaf in ("linear_fc1", "linear_fc2")]
    if narrow:
        present = weights.experts("student", layer, "linear_fc1")
        sums = _moments(work, inputs, teachers, len(kept), lambda e, p, ours, theirs: torch.cat([theirs, ours], -1))
        for expert, of in enumerate(kept):
            target = weights.kept(targets[0][of], name.format(expert, "fc1"), source)
            weights.fit_to_outputs(name.format(expert, "fc1"), target, *sums[expert].total(), present[expert])
    first, second = (weights.experts("student", layer, leaf) for leaf in ("linear_fc1", "linear_fc2"))
    neurons = _neurons_of(work.student[0].config)

    def lacking(expert: int, weight: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
        active = weight * neurons(ours, first[expert])
        aim = weight * F.linear(neurons(theirs, targets[0][kept[expert]]), targets[1][kept[expert]][channels])
        return torch.cat([aim.float() - F.linear(active, second[expert]).float(), active.float()], -1)

    sums = _moments(work, inputs, teachers, len(kept), lacking)
    for expert in range(len(kept)):
        weights.fit_to_residuals(name.format(expert, "fc2"), *sums[expert].total(), second[expert])


def _moments(
    work: Work, inputs: list[Routed], teachers: Stream, experts: int, vectors: Callable[..., Tensor]
) -> list[Moments]:
    """Moments of every expert's vectors. vectors: (expert, router's weights: [tokens, 1], the student's inputs, the
    teacher's) -> [tokens, size]."""
    found: list[Moments] = []
    for (ours, weights), theirs, kind in zip(inputs, teachers, work.kinds, strict=True):
        x, y, w = work.here(ours), work.whole(work.here(theirs)), work.here(weights)
        for expert in range(experts):
            sent = (w[:, expert] > 0).nonzero().flatten()
            z = vectors(expert, w[sent, expert, None].to(x.dtype), x[sent], y[sent])
            if len(found) == expert:
                found.append(Moments(z.shape[1], work.topology))
            found[expert].add(z, kind[sent])
    return found


def _neurons_of(mcore: TransformerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """(inputs, weight of fc1) -> activations that enter fc2."""

    def neurons(inputs: Tensor, weight: Tensor) -> Tensor:
        projected = F.linear(inputs, weight)
        if not mcore.gated_linear_unit:
            return mcore.activation_func(projected)  # type: ignore[no-any-return]
        gate, up = projected.chunk(2, -1)
        return mcore.activation_func(gate) * up  # type: ignore[no-any-return]

    return neurons
