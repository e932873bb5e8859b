"""Memory of weights, gradients and optimizer on a rank, counted from the layout table without starting a process."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..distill import is_packed
from ..layout import Shape, expert_of, layer_of, lookup
from ..parallel import Topology

__all__ = ["WEIGHT_BYTES", "model_bytes", "rank_parameters", "training_parts"]

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two fp32 moments, and an fp32 master copy of bf16 weights; sharded over data-parallel ranks."""


def rank_parameters(shape: Shape, topology: Topology) -> list[tuple[int, int]]:
    """Return (non-expert parameters, expert parameters) of a rank of each pipeline stage.

    The vocabulary is padded, and a tied embedding counts on both stages that hold it. Raises TopologyError if there
    are fewer layers than stages.
    """
    return _weighted_parameters(shape, topology, lambda name: 1)


def _weighted_parameters(shape: Shape, topology: Topology, weigh: Callable[[str], int]) -> list[tuple[int, int]]:
    """Return the same, each parameter multiplied by the weight of its name."""
    sizes, held = shape.sizes(), [[0, 0] for _ in range(topology.pp)]
    stage_of = {layer: at % topology.pp for at, layers in enumerate(topology.stages(shape.layers)) for layer in layers}
    for name in shape.names():
        param, layer, of_expert = lookup(name), layer_of(name), expert_of(name) is not None
        ends = {"embedding.word_embeddings.weight": {0, topology.pp - 1} if shape.tied else {0}}
        split = topology.ep if of_expert else topology.tp if param.tp else 1
        for stage in ends.get(name, {topology.pp - 1}) if layer is None else (stage_of[layer],):
            held[stage][of_expert] += prod(param.shape(sizes)) // split * weigh(name)
    return [(dense, experts) for dense, experts in held]


def model_bytes(shape: Shape, topology: Topology, dtype: str, *, packed: bool = False) -> list[int]:
    """Return the bytes of the weights on a rank of each pipeline stage. packed: the layers' matrices in float8."""

    def weigh(name: str) -> int:
        return 1 if packed and is_packed(name) else WEIGHT_BYTES[dtype]

    return [sum(pair) for pair in _weighted_parameters(shape, topology, weigh)]


def training_parts(shape: Shape, topology: Topology, dtype: str, world: int) -> list[dict[str, float]]:
    """Return the bytes of weights, gradients and optimizer shard on a rank of each pipeline stage, by kind."""
    stage, optimizer = max(1, world // topology.pp), OPTIMIZER_BYTES[dtype]
    dp, edp = max(1, stage // topology.tp), max(1, stage // topology.ep)
    return [
        {
            "weights": (dense + experts) * WEIGHT_BYTES[dtype],
            "gradients": (dense + experts) * GRADIENT_BYTES,
            "optimizer": dense * optimizer / dp + experts * optimizer / edp,
        }
        for dense, experts in rank_parameters(shape, topology)
    ]
