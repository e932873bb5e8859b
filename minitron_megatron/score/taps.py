"""Where each axis is measured, and how a tap's units become the axis's units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Shape, axis_coords, lookup
from ..parallel import Topology, all_reduce

__all__ = ["TAPS", "Tap", "axis_scores"]


@dataclass(frozen=True)
class Tap:
    """The activation that enters (or, of a norm, leaves) a module, whose units are the rows of a parameter's dim."""

    module: str
    """The end of the module's name inside a layer."""
    dim: int
    """Of the module's weight: its rows, by the layout table, say which unit of the axis each activation belongs to."""
    output: bool = False


TAPS: Mapping[str, tuple[Tap, ...]] = {
    "ffn": (Tap("mlp.linear_fc2", 1),),
    "heads": (Tap("self_attention.linear_proj", 1),),
    "hidden": (Tap("input_layernorm", 0, output=True), Tap("pre_mlp_layernorm", 0, output=True)),
}


def axis_scores(axis: str, name: str, dim: int, channels: Tensor, shape: Shape, topology: Topology) -> Tensor:
    """Scores of this rank's channels [local rows] -> of all units of the axis: fp64 [units]. Collective over tp.

    A unit of several channels (a head) scores the L2 norm over them.
    """
    param, sizes = lookup(name), shape.sizes()
    index = axis_coords(axis, param.dims[dim], sizes)
    assert index is not None, f"{axis} does not lie in dim {dim} of {name}"
    rows = param.shard_rows(dim, sizes, topology.tp_rank, topology.tp)
    squares = torch.zeros(shape.axis_size(axis), dtype=torch.float64, device=channels.device)
    squares.index_add_(0, index[rows].to(channels.device), channels.square())
    if param.owner(dim, sizes, topology.tp) is not None:
        all_reduce(squares, topology.tp_group)
    return squares.sqrt()
