"""Where each axis is measured, and how a tap's units become the axis's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import Shape, axis_coords, lookup
from ..parallel import Topology, all_reduce
from ..records import Statistic

__all__ = [
    "TAPS",
    "Tap",
    "axes_of",
    "axis_scores",
    "channel_units",
    "check_axes",
    "check_statistic",
    "head_norms",
    "taps_of",
]


EXPERT_AXES = ("experts", "expert_ffn")
"""Axes that are measured where tokens have lost their places: `experts.py` does."""


@dataclass(frozen=True)
class Tap:
    """The activation that enters or leaves a module, whose units are the rows of a parameter's dim."""

    module: str
    """The end of the module's name inside a layer."""
    dim: int
    """Of the module's weight: its rows, by the layout table, say which unit of the axis each activation belongs to."""
    output: bool = False
    """Whether it is what leaves the module."""
    split: bool = False
    """Whether, under sequence parallelism, it holds this rank's part of the positions only."""


TAPS: Mapping[str, tuple[Tap, ...]] = {
    "ffn": (Tap("mlp.linear_fc2", 1),),
    "shared_ffn": (Tap("mlp.shared_experts.linear_fc2", 1),),
    "heads": (Tap("self_attention.linear_proj", 1),),
    "hidden": (
        Tap("input_layernorm", 0, output=True, split=True),
        Tap("pre_mlp_layernorm", 0, output=True, split=True),
    ),
}
PRE_ACTIVATION = (Tap("mlp.linear_fc1", 0, output=True),)


def taps_of(axis: str, statistic: Statistic, shape: Shape) -> tuple[Tap, ...]:
    """Where an axis is measured, nothing for those of experts; PlanError for `pre` neurons of a gated MLP."""
    if axis in EXPERT_AXES:
        return ()
    if axis != "ffn" or statistic.neurons == "post":
        return TAPS[axis]
    check_statistic(statistic, shape)
    return PRE_ACTIVATION


def check_statistic(statistic: Statistic, shape: Shape) -> None:
    """Raises PlanError where a model of `shape` has no such numbers."""
    if statistic.neurons == "pre" and shape.gated:
        raise PlanError(
            "neurons of a gated MLP have two projections before the activation, so `pre` has no one number. "
            "Score them by `post`."
        )


def check_axes(axes: Sequence[str], shape: Shape) -> None:
    """Raises PlanError for an axis that cannot be scored, or that the model does not have."""
    known = axes_of(shape)
    for axis in axes:
        if axis not in known:
            raise PlanError(f"axis {axis!r} cannot be scored.{did_you_mean(axis, known)} Known: {', '.join(known)}.")


def axes_of(shape: Shape) -> tuple[str, ...]:
    """The axes of a model that can be scored."""
    return tuple(axis for axis in (*TAPS, *EXPERT_AXES) if shape.axis_size(axis))


def channel_units(axis: str, name: str, dim: int, shape: Shape, topology: Topology) -> Tensor:
    """The unit of the axis that each of this rank's channels belongs to: int64 [local rows]."""
    param, sizes = lookup(name), shape.sizes()
    index = axis_coords(axis, param.dims[dim], sizes)
    assert index is not None, f"{axis} does not lie in dim {dim} of {name}"
    return index[param.shard_rows(dim, sizes, topology.tp_rank, topology.tp)].to(topology.device)


def head_norms(activations: Tensor, units: Tensor) -> Tensor:
    """[seq, batch, channels] -> the L2 norm over the channels of each unit that is here, ascending: fp32."""
    present, at = units.unique(return_inverse=True)
    squares = activations.new_zeros(*activations.shape[:-1], len(present), dtype=torch.float32)
    return squares.index_add_(-1, at, activations.float().square()).sqrt()


def axis_scores(
    axis: str, name: str, dim: int, channels: Tensor, units: Tensor, shape: Shape, topology: Topology
) -> Tensor:
    """Scores of this rank's channels, and the unit of each -> of all units of the axis: fp64. Collective over tp.

    A unit of several channels (a head) scores the L2 norm over them.
    """
    squares = torch.zeros(shape.axis_size(axis), dtype=torch.float64, device=channels.device)
    squares.index_add_(0, units, channels.square())
    if lookup(name).owner(dim, shape.sizes(), topology.tp) is not None:
        all_reduce(squares, topology.tp_group)
    return squares.sqrt()
