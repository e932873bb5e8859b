"""Importance of layers, measured by leaving them out of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..data import Batch
from ..errors import PlanError, did_you_mean
from ..events import Event, Listener, silent
from ..layout import Shape
from ..losses import Output, Vocabulary, distill_loss, lm_loss
from ..model import (
    Chunk,
    MicroBatch,
    Model,
    chunks_of,
    evaluating,
    forward_kept,
    forward_only,
    forward_rest,
    output_weight,
    shape_of,
    windows,
)
from ..parallel import Topology, sum_over_world
from ..records import DepthScores
from .accumulate import count
from .bare import bare_chunks

__all__ = ["LOSSES", "Metric", "RunBatches", "TokenMetric", "blocks_of", "count", "expect_finite", "leave_out"]

States = Float[Tensor, "local_seq batch hidden"]
"""Final hidden states of a micro-batch."""

RunBatches = Callable[[Sequence[MicroBatch]], list[States]]
"""`forward_only` of the remaining network: returns the final hidden states of this replica's micro-batches on the last
pipeline stage, and an empty list on earlier stages. Collective over the model's ranks."""

Metric = Callable[[RunBatches], float]
"""A caller's own metric; higher is better. It is called on every rank and must return the same number on each."""

Layers = Sequence[int]

Measure = Callable[[Layers, Sequence[Layers]], list[float]]
"""(layers already removed, blocks) -> the metric without those layers and each block in turn. If no layer is removed
yet, the metric of the whole network comes first."""

Progress = Callable[[int], None]
"""Reports how many more forward passes (networks x micro-batches) are done."""

ValueOf = Callable[[Topology, Sequence[States], Chunk, States, Batch, int], Float[Tensor, ""]]
"""(topology, final hidden states of the whole network, chunk, hidden, batch, index) -> value, summed over the tokens
that count."""


@dataclass(frozen=True)
class TokenMetric:
    """Mean over tokens of a value of the final hidden states; lower is better."""

    name: str
    value: ValueOf
    compares: bool = False
    """Whether the value needs the states of the whole network, also where layers are already removed."""


def leave_out(
    model: Model,
    batches: Sequence[Batch],
    *,
    topology: Topology,
    lengths: Sequence[int] = (1,),
    metric: str | TokenMetric | Metric = "loss",
    greedy: int = 0,
    model_hash: str = "",
    listener: Listener = silent,
) -> DepthScores:
    """Measure the network without each block of `lengths` layers, on this data-parallel rank's batches.

    metric: `loss` (cross-entropy) or `kl` (KL(whole network || remaining network)), in nats per token; another
    TokenMetric; or a function that brings its own data. greedy: how many layers to remove one by one in addition, each
    time the layer whose removal hurts least (ties: the first); single layers are then measured too. Sources: Minitron
    section 2.2; second paper, figures 8 and 9.

    With a TokenMetric, no layer before a block runs again: one pass of the network over a window of micro-batches
    keeps the states that enter each layer, (layers of the rank + 1) x window x seq x batch x hidden numbers. With a
    function, each network runs as a whole. Every rank returns the same. Collective over the world. Raises PlanError for
    an unknown metric, a wrapped model, a length that removes or leaves no layer, and a value that is not finite.
    """
    shape = shape_of(bare_chunks(model)[0])
    blocks = blocks_of(shape, {*lengths, 1} if greedy else lengths)
    _check_counts(shape, [greedy] if greedy else [])
    samples, tokens = count(batches, topology)
    networks = 1 + len(blocks) + sum(shape.layers - gone for gone in range(1, greedy))
    metric = _token_metric(metric) if isinstance(metric, str) else metric
    if by_token := isinstance(metric, TokenMetric):
        progress = _progress(listener, networks * len(batches) * topology.dp, topology.dp)
        measure = _by_token(model, batches, metric, tokens, topology, progress)
    else:
        measure = _by_function(model, metric, _progress(listener, networks))
    with evaluating(model):
        baseline, *values = measure((), [range(first, first + length) for first, length in blocks])
        found = dict(zip(blocks, values, strict=True))
        expect_finite(found, baseline)
        singles = {first: value for (first, length), value in found.items() if length == 1}
        order = _one_by_one(measure, singles, greedy, lower=by_token)
    name = metric.name if isinstance(metric, TokenMetric) else getattr(metric, "__name__", "metric")
    return DepthScores(shape, name, by_token, baseline, found, order, samples, tokens, model_hash)


def blocks_of(shape: Shape, lengths: Sequence[int] | set[int]) -> list[tuple[int, int]]:
    """Return (first layer, length) of every block. Raises PlanError for no lengths, or one that leaves no layer."""
    _check_counts(shape, lengths)
    if not lengths:
        raise PlanError(f"no block length is given. Give lengths from 1 to {shape.layers - 1}.")
    return [(first, length) for length in sorted({*lengths}) for first in range(shape.layers - length + 1)]


def _check_counts(shape: Shape, counts: Sequence[int] | set[int]) -> None:
    """Raise PlanError unless each count of layers can be left out."""
    for asked in counts:
        if not 1 <= asked < shape.layers:
            raise PlanError(
                f"{asked} of {shape.layers} layers cannot be left out at once. Use 1 to {shape.layers - 1}."
            )


def expect_finite(found: Mapping[tuple[int, int], float], baseline: float = 0.0) -> None:
    """Raise PlanError if the metric of the whole network, or of it without a block, is not finite."""
    if not math.isfinite(baseline):
        raise PlanError(
            f"the whole network measures {baseline}. Check its weights for NaN or infinity, or score in float32."
        )
    for (first, length), value in found.items():
        if not math.isfinite(value):
            raise PlanError(
                f"leaving out layers {first} to {first + length - 1} measures {value}, which cannot be ranked. "
                "Check the weights there for NaN or infinity, or score in float32."
            )


def _progress(listener: Listener, total: int, each: int = 1) -> Progress:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more * each
        listener(Event("depth", done, total, "passes"))

    return report


def _one_by_one(
    measure: Measure, singles: dict[int, float], steps: int, *, lower: bool
) -> tuple[tuple[int, float], ...]:
    """Return the greedy order of removal. singles: layer -> the metric without that layer alone; lower:
    whether lower metrics are better."""
    order: list[tuple[int, float]] = []
    for step in range(steps):
        if step:
            removed = [layer for layer, _ in order]
            rest = [layer for layer in singles if layer not in removed]
            singles = dict(zip(rest, measure(removed, [(layer,) for layer in rest]), strict=True))
            expect_finite({(layer, 1): value for layer, value in singles.items()})
        best = (min if lower else max)(singles, key=singles.__getitem__)
        order.append((best, singles[best]))
    return tuple(order)


def _by_function(model: Model, metric: Metric, progress: Progress) -> Measure:
    def measure(removed: Layers, blocks: Sequence[Layers]) -> list[float]:
        values = []
        for block in blocks if removed else [(), *blocks]:
            values.append(float(metric(partial(forward_only, model, without=(*removed, *block)))))
            progress(1)
        return values

    return measure


def _token_metric(name: str) -> TokenMetric:
    if name not in LOSSES:
        raise PlanError(
            f"metric {name!r} is not known.{did_you_mean(name, LOSSES)} Use {' or '.join(LOSSES)}, or a function."
        )
    return LOSSES[name]


def _by_token(
    model: Model, batches: Sequence[Batch], metric: TokenMetric, tokens: int, topology: Topology, progress: Progress
) -> Measure:
    def measure(removed: Layers, blocks: Sequence[Layers]) -> list[float]:
        sums = torch.zeros(1 + len(blocks), dtype=torch.float64, device=topology.device)
        for window in windows(batches, topology.pp):
            hidden, kept = forward_kept(model, window, without=removed)
            whole = forward_only(model, window) if removed and metric.compares else hidden
            value_of = partial(metric.value, topology, whole)
            if not removed:
                chunk = chunks_of(model)[-1]
                sums[0] += sum(value_of(chunk, h, b, i) for i, (h, b) in enumerate(zip(hidden, window, strict=False)))
            sums[1:] += forward_rest(model, window, kept, blocks, value_of, without=removed).sum(1)
            progress(len(window) * (len(blocks) + (not removed)))
        total = sum_over_world(sums * (topology.is_last_stage and topology.tp_rank == 0)) / max(tokens, 1)
        return total[1:].tolist() if removed else total.tolist()

    return measure


def _loss(
    topology: Topology, whole: Sequence[States], chunk: Chunk, hidden: States, batch: Batch, index: int
) -> Float32[Tensor, ""]:
    model = Output(hidden, output_weight(chunk).detach())
    return lm_loss(model, batch.labels, batch.mask, _vocabulary(topology, chunk))


def _kl(
    topology: Topology, whole: Sequence[States], chunk: Chunk, hidden: States, batch: Batch, index: int
) -> Float32[Tensor, ""]:
    """Return the summed KL from the whole network. whole: its final hidden states."""
    weight = output_weight(chunk).detach()
    models = Output(hidden, weight), Output(whole[index], weight)
    return distill_loss(*models, batch.mask, _vocabulary(topology, chunk))


def _vocabulary(topology: Topology, chunk: Chunk) -> Vocabulary:
    return Vocabulary(shape_of(chunk).vocab, topology.tp_group, topology.sequence_parallel)


LOSSES = {"loss": TokenMetric("loss", _loss), "kl": TokenMetric("kl", _kl, compares=True)}
