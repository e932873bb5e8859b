"""Scores of MoE experts and of their neurons, exact at every expert- and data-parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..errors import PlanError
from ..model import Model, chunks_of
from ..parallel import Topology, all_reduce, gather_objects, gather_sequence, local_sequence
from ..records import REDUCTIONS, Statistic
from .accumulate import Accumulator
from .taps import EXPERT_AXES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["Mixture", "mixtures"]


class Mixture:
    """Hooks of one MoE layer and the sums that they collect.

    The score of an expert is the mean L2 norm of its output times the router's weight, over the tokens routed to it
    (ModelOpt's choice). A neuron of an expert is scored by the statistic over all positions of a sample; at positions
    that are not routed to its expert, its activation counts as zero.
    """

    def __init__(
        self,
        layer: TransformerLayer,
        statistic: Statistic,
        axes: tuple[str, ...],
        topology: Topology,
        mask: Callable[[], Bool[Tensor, "batch seq"]],
    ) -> None:
        """mask: returns the positions of the current micro-batch that count."""
        self.layer: int = layer.layer_number - 1
        self.topology, self.statistic, self.axes, self.mask = topology, statistic, axes, mask
        if not hasattr(layer.mlp.experts, "local_experts"):
            raise PlanError(
                f"the experts of layer {self.layer} are {type(layer.mlp.experts).__name__}, but scoring needs one "
                "module per expert. Build the model with moe_grouped_gemm=False."
            )
        experts = layer.mlp.experts.local_experts
        self.norms = torch.zeros(2, len(experts), dtype=torch.float64, device=topology.device)  # sums, tokens
        self.neurons = [Accumulator(statistic) for _ in experts]
        self.first: int = layer.mlp.local_expert_indices[0]
        self.handles = [layer.mlp.router.register_forward_hook(self._route)]
        for expert, module in enumerate(experts):
            self.handles.append(module.linear_fc2.register_forward_hook(self._expert_hook(expert)))

    def _route(self, router: object, args: object, out: tuple[Tensor, Tensor]) -> None:
        """Record the sample of each token that the local experts are about to get.

        mcore orders these tokens by rank of the expert-parallel group, then by position among the rank's tokens.
        """
        topology, mask, group = self.topology, self.mask(), self.topology.ep_group
        samples = len(mask)
        lengths = torch.zeros(topology.dp, samples, dtype=torch.float64, device=mask.device)
        lengths[topology.dp_rank] = mask.sum(1)
        self.lengths = all_reduce(lengths, topology.dp_group).flatten()
        counted = mask.t()
        if topology.sequence_parallel:
            counted = local_sequence(counted, topology.tp_group)
        sample = (torch.arange(samples, device=mask.device) + samples * topology.dp_rank).expand(len(counted), samples)
        sample = torch.where(counted, sample, -1).flatten()
        sent = gather_sequence(out[1].to(torch.uint8), group).bool()
        self.sample = gather_sequence(sample, group)
        self.sent = sent[:, self.first : self.first + len(self.neurons)]

    def _expert_hook(self, expert: int) -> Callable[..., None]:
        def hook(linear: object, args: tuple[Tensor, ...], out: tuple[Tensor, object]) -> None:
            sample = self.sample[self.sent[:, expert]]
            counts = sample >= 0
            if "experts" in self.axes:
                norms = out[0].detach()[counts].float().norm(dim=-1)
                self.norms[:, expert] += torch.stack([norms.sum(dtype=torch.float64), counts.sum().double()])
            if "expert_ffn" in self.axes:
                self._add_neurons(self.neurons[expert], args[0].detach()[counts].float(), sample[counts])

        return hook

    def _add_neurons(
        self, sums: Accumulator, activations: Float[Tensor, "tokens neurons"], sample: Int64[Tensor, "tokens"]
    ) -> None:
        """Add one expert's tokens to `sums`. Collective over the ranks with the same experts."""
        lengths = self.lengths

        def total(numbers: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            table = torch.zeros(len(lengths), numbers.shape[1], dtype=torch.float64, device=numbers.device)
            return all_reduce(table.index_add_(0, sample, numbers.double()), self.topology.edp_group)

        length = lengths.clamp(min=1).unsqueeze(1)
        per_sample = REDUCTIONS[self.statistic.sequence].over_positions(activations, length, total)
        sums.add_samples(per_sample.double(), (lengths > 0).double())

    def results(self) -> Iterator[tuple[str, Float64[Tensor, "units"]]]:
        """Yield (axis, scores of all experts' units). Collective over the ranks that hold the experts."""
        if "experts" in self.axes:
            sums, tokens = all_reduce(self.norms.clone(), self.topology.edp_group)
            yield "experts", self._gather_experts(sums / tokens.clamp(min=1))
        if "expert_ffn" in self.axes:
            yield "expert_ffn", self._gather_experts(torch.cat([sums.result(None) for sums in self.neurons]))

    def _gather_experts(self, local: Tensor) -> Tensor:
        return torch.cat([part.to(local.device) for part in gather_objects(local.cpu(), self.topology.ep_group)])


def mixtures(
    model: Model,
    statistic: Statistic,
    axes: Sequence[str],
    topology: Topology,
    mask: Callable[[], Bool[Tensor, "batch seq"]],
) -> list[Mixture]:
    """Hook every MoE layer of this rank for the expert axes among `axes`; without such axes, hook nothing."""
    wanted = tuple(axis for axis in axes if axis in EXPERT_AXES)
    layers = [layer for chunk in chunks_of(model) for layer in chunk.decoder.layers] if wanted else []
    return [Mixture(layer, statistic, wanted, topology, mask) for layer in layers]
