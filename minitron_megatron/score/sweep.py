"""Scores of all requested axes from one forward sweep over the calibration set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..data import Batch
from ..errors import PlanError
from ..events import Event, Listener, silent
from ..layout import PER_LAYER, Shape, layer_of
from ..model import (
    FUSED_NORM,
    MicroBatch,
    Model,
    NamedShard,
    forward_only,
    fused_norm,
    named_shards,
    shape_of,
    windows,
)
from ..parallel import Topology, fail_together, gather_objects
from ..records import Scores, Statistic
from .accumulate import Accumulator, count
from .bare import bare_chunks
from .experts import mixtures
from .taps import Tap, axes_of, axis_scores, channel_units, check_axes, head_norms, taps_of

__all__ = ["score"]

Values = dict[str, dict[int | None, Float64[Tensor, "_units"]]]
"""Axis -> layer -> scores of the units. The layer is None for an axis that all layers share."""

Broken = list[tuple[int, str]]
"""(layer, axis) of each tap with a NaN or an infinity, in the order of the modules."""


@dataclass(frozen=True)
class _Site:
    """A tap on one module of this rank."""

    axis: str
    name: str
    """The parameter whose layout maps channels to units."""
    dim: int
    units: Int64[Tensor, "local_units"]
    """Unit of each accumulated number."""
    sums: Accumulator


class _Sweep:
    """Hooks of one sweep and the sums that they collect."""

    def __init__(
        self, model: Model, axes: Sequence[str], statistic: Statistic, shape: Shape, topology: Topology
    ) -> None:
        self.mask: Bool[Tensor, "batch seq"] | None = None
        self.shape, self.topology, self.statistic = shape, topology, statistic
        self.sites: list[_Site] = []
        self.handles = []
        taps = [(axis, tap) for axis in axes for tap in taps_of(axis, statistic, self.shape)]
        for shard in named_shards(model):
            for axis, tap in taps:
                if shard.name.endswith(f".{tap.module}.weight"):
                    self.handles.append(self._hook(shard, axis, tap))
        self.mixtures = mixtures(model, statistic, axes, topology, self.current_mask)
        self.handles += [handle for mixture in self.mixtures for handle in mixture.handles]

    def _hook(self, shard: NamedShard, axis: str, tap: Tap) -> RemovableHandle:
        module, name = shard.module, shard.name
        channels = channel_units(axis, name, tap.dim, self.shape, self.topology)
        norms = axis == "heads" and self.statistic.heads == "norm_first"
        shared = tap.split and self.topology.sequence_parallel
        sums = Accumulator(self.statistic, self.topology.tp_group if shared else None)
        self.sites.append(_Site(axis, name, tap.dim, channels.unique() if norms else channels, sums))

        def record(activations: Tensor | tuple[Tensor, ...]) -> None:
            a = activations[0] if isinstance(activations, tuple) else activations  # mcore's linears: (output, bias)
            sums.add(head_norms(a, channels) if norms else a, self.current_mask())

        if shard.leaf == FUSED_NORM:
            return module.register_forward_pre_hook(lambda _, args: record(fused_norm(module, args[0])))
        if tap.output:
            return module.register_forward_hook(lambda _, args, out: record(out))
        return module.register_forward_pre_hook(lambda _, args: record(args[0]))

    def begin(self, batch: MicroBatch) -> None:
        """Give the hooks the mask of the next micro-batch."""
        self.mask = batch.mask

    def current_mask(self) -> Bool[Tensor, "batch seq"]:
        """Return the positions of the current micro-batch that count."""
        assert self.mask is not None
        return self.mask

    def results(self) -> tuple[Values, Broken]:
        """Return the scores of this pipeline stage, the same on all ranks of tp and dp. Collective over both."""
        out: Values = {}
        broken: Broken = []
        for at, axis, units in self._scored():
            if not bool(units.isfinite().all()):
                broken.append((at, axis))
            layer = at if axis in PER_LAYER else None
            scores = out.setdefault(axis, {})
            scores[layer] = scores[layer] + units if layer in scores else units
        return out, broken

    def _scored(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (layer, axis, scores) of every tap on this rank."""
        for site in self.sites:
            sums = site.sums.result(self.topology.dp_group)
            units = axis_scores(site.axis, site.name, site.dim, sums, site.units, self.shape, self.topology)
            at = layer_of(site.name)
            assert at is not None
            yield at, site.axis, units
        for mixture in self.mixtures:
            for axis, units in mixture.results():
                yield mixture.layer, axis, units


def score(
    model: Model,
    batches: Sequence[Batch],
    axes: Sequence[str] | None = None,
    *,
    topology: Topology,
    statistic: Statistic | None = None,
    model_hash: str = "",
    listener: Listener = silent,
) -> Scores:
    """Score every unit of `axes` (None: all of the model's) by forward passes over this data-parallel rank's batches.

    Neurons, heads and experts are scored per layer, hidden channels over all block norms together (ModelOpt's reading
    of Minitron section 2.2). Every rank returns the same Scores. Collective over the world. Raises PlanError for an
    unknown axis, a wrapped model, a statistic that the MLP does not have, and on every rank for activations that are
    not finite.
    """
    statistic, shape = statistic or Statistic(), shape_of(bare_chunks(model)[0])
    axes = axes_of(shape) if axes is None else axes
    check_axes(axes, shape)
    sweep = _Sweep(model, axes, statistic, shape, topology)
    try:
        done, total = 0, sum(len(batch.tokens) for batch in batches)
        for window in windows(batches, topology.pp):
            forward_only(model, window, before=sweep.begin)
            done += sum(len(batch.tokens) for batch in window)
            listener(Event("score", done * topology.dp, total * topology.dp, "samples"))
    finally:
        for handle in sweep.handles:
            handle.remove()
    samples, tokens = count(batches, topology)
    return Scores(_merge(*sweep.results(), topology), shape, statistic, samples, tokens, model_hash)


def _merge(stage_scores: Values, broken: Broken, topology: Topology) -> Values:
    """Merge the scores of all pipeline stages: layers in order, a shared axis summed in order of the stages.

    Collective over the world. Raises PlanError on every rank if any rank has a tap that is not finite.
    """
    on_cpu = {axis: {layer: units.cpu() for layer, units in layers.items()} for axis, layers in stage_scores.items()}
    stages, lists = zip(*gather_objects((on_cpu, broken), topology.pp_group), strict=True)
    with fail_together():
        _expect_finite([tap for taps in lists for tap in taps])
    out: Values = {}
    for stage in stages:
        for axis, layers in stage.items():
            merged = out.setdefault(axis, {})
            for layer, units in layers.items():
                merged[layer] = merged[layer] + units if layer in merged else units
    return {
        axis: dict(sorted(layers.items(), key=lambda item: -1 if item[0] is None else item[0]))
        for axis, layers in out.items()
    }


def _expect_finite(broken: Broken) -> None:
    if broken:
        layer, axis = min(broken, key=lambda tap: tap[0])
        raise PlanError(
            f"layer {layer} is the first with activations that are not finite (NaN or infinite), on axis {axis}. "
            "Check its weights for NaN or infinity, or score in float32."
        )
