"""One forward sweep over the calibration set scores every axis asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import PlanError, did_you_mean
from ..events import Event, Listener, silent
from ..layout import PER_LAYER, layer_of
from ..model import MicroBatch, chunks_of, config_of, forward_only, named_shards, windows
from ..parallel import Topology, all_reduce, gather_objects
from ..records import Scores, Statistic
from .accumulate import Accumulator
from .taps import TAPS, Tap, axis_scores

__all__ = ["score"]


class _Sweep:
    """The hooks of one sweep and what they add up."""

    def __init__(self, model: Any, axes: Sequence[str], statistic: Statistic, topology: Topology) -> None:
        self.mask: Tensor | None = None
        self.topology = topology
        self.sums: dict[tuple[str, str, int], Accumulator] = {}
        self.handles = []
        for shard in named_shards(model):
            for axis in axes:
                for tap in TAPS[axis]:
                    if shard.leaf == "weight" and shard.name.endswith(f".{tap.module}.weight"):
                        self.handles.append(self._hook(shard.module, axis, shard.name, tap, statistic))

    def _hook(self, module: nn.Module, axis: str, name: str, tap: Tap, statistic: Statistic) -> Any:
        shared = tap.output and self.topology.sequence_parallel  # norms see this rank's part of the sequence only
        sums = self.sums[axis, name, tap.dim] = Accumulator(statistic, self.topology.tp_group if shared else None)

        def seen(activations: Tensor) -> None:
            assert self.mask is not None
            sums.add(activations, self.mask)

        if tap.output:
            return module.register_forward_hook(lambda _, args, out: seen(out))
        return module.register_forward_pre_hook(lambda _, args: seen(args[0]))

    def begin(self, batch: MicroBatch) -> None:
        """Tells the hooks which positions of the micro-batch that comes next count."""
        self.mask = batch.mask

    def results(self, shape: Any) -> dict[str, dict[int | None, Tensor]]:
        """Axis -> layer -> scores of this pipeline stage. Collective over tp and dp."""
        out: dict[str, dict[int | None, Tensor]] = {}
        for (axis, name, dim), sums in self.sums.items():
            units = axis_scores(axis, name, dim, sums.result(self.topology.dp_group), shape, self.topology)
            layer = layer_of(name) if axis in PER_LAYER else None
            mine = out.setdefault(axis, {})
            mine[layer] = mine[layer] + units if layer in mine else units
        return out


def score(
    model: Any,
    batches: Sequence[Batch],
    axes: Sequence[str] = ("ffn", "heads", "hidden"),
    *,
    topology: Topology,
    statistic: Statistic | None = None,
    model_hash: str = "",
    listener: Listener = silent,
) -> Scores:
    """Importance of every unit of `axes`, from forward passes over this data-parallel rank's batches.

    Neurons and heads are scored a layer, hidden channels over all block norms together (ModelOpt's reading of Minitron
    section 2.2). Every rank returns the same Scores. Collective over the world. Raises PlanError for an unknown axis.
    """
    for axis in axes:
        if axis not in TAPS:
            raise PlanError(f"axis {axis!r} cannot be scored.{did_you_mean(axis, TAPS)} Known: {', '.join(TAPS)}.")
    statistic, shape = statistic or Statistic(), config_of(chunks_of(model)[0]).shape
    sweep = _Sweep(model, axes, statistic, topology)
    try:
        done, total = 0, sum(len(batch.tokens) for batch in batches)
        for window in windows(batches, topology.pp):
            forward_only(model, window, before=sweep.begin)
            done += sum(len(batch.tokens) for batch in window)
            listener(Event("score", done * topology.dp, total * topology.dp, "samples"))
    finally:
        for handle in sweep.handles:
            handle.remove()
    counts = torch.tensor([sum(len(b.tokens) for b in batches), sum(int(b.mask.sum()) for b in batches)])
    samples, tokens = (int(n) for n in all_reduce(counts.to(topology.device), topology.dp_group))
    return Scores(_merge(sweep.results(shape), topology), shape, statistic, samples, tokens, model_hash)


def _merge(mine: dict[str, dict[int | None, Tensor]], topology: Topology) -> dict[str, dict[int | None, Tensor]]:
    """The scores of all pipeline stages, layers in order, a shared axis summed in order of the stages."""
    stages = gather_objects(
        {a: {k: v.cpu() for k, v in layers.items()} for a, layers in mine.items()}, topology.pp_group
    )
    out: dict[str, dict[int | None, Tensor]] = {}
    for stage in stages:
        for axis, layers in stage.items():
            merged = out.setdefault(axis, {})
            for layer, units in layers.items():
                merged[layer] = merged[layer] + units if layer in merged else units
    return {
        axis: dict(sorted(layers.items(), key=lambda item: -1 if item[0] is None else item[0]))
        for axis, layers in out.items()
    }
