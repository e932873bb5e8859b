"""Measuring points (taps) of each axis, and the mapping from a tap's channels to the axis's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
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
"""Axes of MoE experts. The router reorders tokens, so `experts.py` measures these axes."""


@dataclass(frozen=True)
class Tap:
    """An activation that enters or leaves a module; its channels are the rows of one dim of the module's weight."""

    module: str
    """End of the module's name inside a layer."""
    dim: int
    """Dim of the module's weight; the layout table maps its rows to units of the axis."""
    output: bool = False
    """True: the module's output; false: its input."""
    split: bool = False
    """True: with sequence parallelism each rank sees only its part of the positions."""


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
    """Return the taps of an axis (none for expert axes). Raises PlanError for `pre` neurons of a gated MLP."""
    if axis in EXPERT_AXES:
        return ()
    if axis != "ffn" or statistic.neurons == "post":
        return TAPS[axis]
    check_statistic(statistic, shape)
    return PRE_ACTIVATION


def check_statistic(statistic: Statistic, shape: Shape) -> None:
    """Raise PlanError if a model of `shape` cannot be scored by this statistic."""
    if statistic.neurons == "pre" and shape.gated:
        raise PlanError(
            "neurons of a gated MLP have two projections before the activation, so `pre` is not one number. "
            "Score them by `post`."
        )


def check_axes(axes: Sequence[str], shape: Shape) -> None:
    """Raise PlanError for an axis that cannot be scored, or that the model does not have."""
    known = axes_of(shape)
    for axis in axes:
        if axis not in known:
            raise PlanError(f"axis {axis!r} cannot be scored.{did_you_mean(axis, known)} Known: {', '.join(known)}.")


def axes_of(shape: Shape) -> tuple[str, ...]:
    """Return the axes of a model that can be scored."""
    return tuple(axis for axis in (*TAPS, *EXPERT_AXES) if shape.axis_size(axis))


def channel_units(axis: str, name: str, dim: int, shape: Shape, topology: Topology) -> Int64[Tensor, "local_rows"]:
    """Return the axis unit that each of this rank's channels belongs to."""
    param, sizes = lookup(name), shape.sizes()
    index = axis_coords(axis, param.dims[dim], sizes)
    assert index is not None, f"{axis} does not lie in dim {dim} of {name}"
    return index[param.shard_rows(dim, sizes, topology.tp_rank, topology.tp)].to(topology.device)


def head_norms(
    activations: Float[Tensor, "seq batch channels"], units: Int64[Tensor, "channels"]
) -> Float32[Tensor, "seq batch local_units"]:
    """Return the L2 norm over the channels of each local unit, units ascending. units: the unit of each channel."""
    present, at = units.unique(return_inverse=True)
    squares = activations.new_zeros(*activations.shape[:-1], len(present), dtype=torch.float32)
    return squares.index_add_(-1, at, activations.float().square()).sqrt()


def axis_scores(
    axis: str,
    name: str,
    dim: int,
    channels: Float64[Tensor, "channels"],
    units: Int64[Tensor, "channels"],
    shape: Shape,
    topology: Topology,
) -> Float64[Tensor, "units"]:
    """Return the scores of all units of the axis from this rank's channels. Collective over tp.

    channels: scores of this rank's channels; units: the unit of each. The score of a unit with several channels (a
    head) is the L2 norm over them.
    """
    squares = torch.zeros(shape.axis_size(axis), dtype=torch.float64, device=channels.device)
    squares.index_add_(0, units, channels.square())
    if lookup(name).owner(dim, shape.sizes(), topology.tp) is not None:
        all_reduce(squares, topology.tp_group)
    return squares.sqrt()
