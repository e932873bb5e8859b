"""Block importance (BI): how far a block of layers rotates the hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64
from torch import Tensor

from ..data import Batch
from ..events import Event, Listener, silent
from ..model import MicroBatch, Model, States, evaluating, forward_kept, shape_of, windows
from ..parallel import Topology, move, sum_over_world
from ..records import DepthScores
from .accumulate import count
from .bare import bare_chunks
from .depth import blocks_of, expect_finite

__all__ = ["block_importance"]

Block = tuple[int, int]
"""(first layer, how many)."""


def block_importance(
    model: Model,
    batches: Sequence[Batch],
    *,
    topology: Topology,
    lengths: Sequence[int] = (1,),
    model_hash: str = "",
    listener: Listener = silent,
) -> DepthScores:
    """Return 1 - the mean cosine, over tokens, between the input and the output of each block of `lengths` layers.

    Runs one forward pass over this data-parallel rank's batches and keeps (layers of the rank + 1) x window of
    micro-batches x seq x batch x hidden numbers. The states that enter a block are sent to the pipeline stage of its
    last layer. Every rank returns the same. Collective over the world. Raises PlanError for a length that leaves no
    layer, a wrapped model, and states that are not finite.
    Sources: Minitron section 2.2, after ShortGPT; blocks of several layers after Gromov et al.
    """
    shape = shape_of(bare_chunks(model)[0])
    blocks = blocks_of(shape, lengths)
    samples, tokens = count(batches, topology)
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=topology.device)
    done = 0
    with evaluating(model):
        for window in windows(batches, topology.pp):
            _, kept = forward_kept(model, window)
            for batch, states in zip(window, kept, strict=True):
                sums += _cosines(states, batch, blocks, shape.layers, topology)
            done += len(window)
            listener(Event("depth", done * topology.dp, len(batches) * topology.dp, "passes"))
    counts_here = topology.sequence_parallel or topology.tp_rank == 0
    means = (sum_over_world(sums * counts_here) / max(tokens, 1)).tolist()
    found = {block: 1 - mean for block, mean in zip(blocks, means, strict=True)}
    expect_finite(found)
    return DepthScores(shape, "bi", True, 0.0, found, (), samples, tokens, model_hash)


def _cosines(
    states: States, batch: MicroBatch, blocks: Sequence[Block], layers: int, topology: Topology
) -> Float64[Tensor, "blocks"]:
    """Return, for each block that ends on this pipeline stage, the summed cosines of this rank's counted tokens.

    Collective over pp: every rank goes through all blocks in the same order, so that each send meets its receive.
    """
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=topology.device)
    mask, like = _local(batch.mask.t(), topology), next(iter(states.values()))
    for first in range(layers):
        ends = {at: topology.stage_of(a + n - 1, layers) for at, (a, n) in enumerate(blocks) if a == first}
        source = _rank(topology.stage_of(first, layers), topology)
        for stage in sorted(set(ends.values())):
            entering = move(states.get(first), like.shape, like.dtype, like.device, source, _rank(stage, topology))
            if entering is None:
                continue
            for at in (at for at, end in ends.items() if end == stage):
                leaving = states[first + blocks[at][1]]
                sums[at] = F.cosine_similarity(entering.double(), leaving.double(), dim=-1)[mask].sum()
    return sums


def _rank(stage: int, topology: Topology) -> int:
    """Return this rank's counterpart on a pipeline stage."""
    return topology.rank_at(stage, topology.tp_rank, topology.dp_rank)


def _local(sequence_first: Bool[Tensor, "seq batch"], topology: Topology) -> Bool[Tensor, "local_seq batch"]:
    """Return this rank's part of a mask: all of it without sequence parallelism."""
    return sequence_first.chunk(topology.tp)[topology.tp_rank] if topology.sequence_parallel else sequence_first
