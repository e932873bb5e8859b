"""Which layers matter: the network is measured without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..errors import PlanError, did_you_mean
from ..events import Event, Listener, silent
from ..layout import Shape
from ..losses import distill_loss, lm_loss
from ..model import MicroBatch, chunks_of, config_of, forward_kept, forward_only, forward_rest, output_weight, windows
from ..parallel import Topology, all_reduce, sum_over_world
from ..records import DepthScores
from .bare import bare_chunks

__all__ = ["Metric", "RunBatches", "blocks_of", "count", "evaluating", "expect_finite", "leave_out"]

RunBatches = Callable[[Sequence[MicroBatch]], list[Tensor]]
"""`forward_only` of what is left of the network: the final hidden states of this replica's micro-batches on the last
pipeline stage, nothing before it. Collective over the model's ranks."""

Metric = Callable[[RunBatches], float]
"""A caller's own measure, higher is better. Called on every rank, it gives the same number on each."""

Layers = Sequence[int]

Measure = Callable[[Layers, Sequence[Layers]], list[float]]
"""(layers gone already, blocks) -> the metric without the former and each block in turn; where nothing is gone already,
that of the whole network comes first."""

Tell = Callable[[int], None]
"""Progress: so many more networks are through so many micro-batches."""

LOSSES = ("loss", "kl")


def leave_out(
    model: Any,
    batches: Sequence[Batch],
    *,
    topology: Topology,
    lengths: Sequence[int] = (1,),
    metric: str | Metric = "loss",
    greedy: int = 0,
    model_hash: str = "",
    listener: Listener = silent,
) -> DepthScores:
    """The metric of the network without each block of so many layers, measured on this data-parallel rank's batches.

    metric: `loss` (cross-entropy) or `kl` (KL(whole network || what is left)), in nats per token; or a function, which
    brings its own data. greedy: how many layers to take one by one besides, each the best to lose after those before
    it (of equals the first); single layers are then measured too. Sources: Minitron section 2.2; its second paper,
    figures 8 and 9.

    With `loss` and `kl` no layer before a block runs again, for the states that enter each layer are kept from one pass
    of the network over a window of micro-batches: (layers of the rank + 1) x window x seq x batch x hidden numbers. A
    function runs each network whole. Every rank returns the same. Collective over the world. Raises PlanError for an
    unknown metric, a wrapped model, where fewer than one layer would go or stay, and where a value is not finite.
    """
    shape = config_of(bare_chunks(model)[0]).shape
    blocks = blocks_of(shape, {*lengths, 1} if greedy else lengths)
    _check_counts(shape, [greedy] if greedy else [])
    samples, tokens = count(batches, topology)
    networks = 1 + len(blocks) + sum(shape.layers - gone for gone in range(1, greedy))
    if isinstance(metric, str):
        tell = _teller(listener, networks * len(batches) * topology.dp, topology.dp)
        measure = _by_loss(model, batches, metric, tokens, topology, tell)
    else:
        measure = _by_function(model, metric, _teller(listener, networks))
    with evaluating(model):
        baseline, *values = measure((), [range(first, first + length) for first, length in blocks])
        found = dict(zip(blocks, values, strict=True))
        expect_finite(found, baseline)
        singles = {first: value for (first, length), value in found.items() if length == 1}
        order = _one_by_one(measure, singles, greedy, min if isinstance(metric, str) else max)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    return DepthScores(shape, name, isinstance(metric, str), baseline, found, order, samples, tokens, model_hash)


def blocks_of(shape: Shape, lengths: Sequence[int] | set[int]) -> list[tuple[int, int]]:
    """(first layer, how many) of every block of these lengths. PlanError for none, or one that leaves no layer."""
    _check_counts(shape, lengths)
    if not lengths:
        raise PlanError(f"no length of block is asked for. Ask for some of 1 to {shape.layers - 1}.")
    return [(first, length) for length in sorted({*lengths}) for first in range(shape.layers - length + 1)]


def _check_counts(shape: Shape, counts: Sequence[int] | set[int]) -> None:
    """Raises PlanError unless each count of layers can be left out."""
    for asked in counts:
        if not 1 <= asked < shape.layers:
            raise PlanError(
                f"{asked} of {shape.layers} layers should be left out at once. Ask for 1 to {shape.layers - 1}."
            )


def expect_finite(found: Mapping[tuple[int, int], float], baseline: float = 0.0) -> None:
    """Raises PlanError where the whole network, or it without a block, has a value that ranks nothing."""
    if not math.isfinite(baseline):
        raise PlanError(f"the whole network measures {baseline}. Look for broken weights, or score in float32.")
    for (first, length), value in found.items():
        if not math.isfinite(value):
            raise PlanError(
                f"layers {first} to {first + length - 1} measure {value}, which ranks nothing. "
                "Look for broken weights there, or score in float32."
            )


def count(batches: Sequence[Batch], topology: Topology) -> tuple[int, int]:
    """(samples, tokens that count) of all data-parallel ranks. Collective over dp."""
    mine = torch.tensor([sum(len(b.tokens) for b in batches), sum(int(b.mask.sum()) for b in batches)])
    samples, tokens = all_reduce(mine.to(topology.device), topology.dp_group).tolist()
    return samples, tokens


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients, nor mcore's recomputation, which is for training and counts layers by itself."""
    was_training = [chunk.training for chunk in chunks_of(model)]
    try:
        for chunk in chunks_of(model):
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(chunks_of(model), was_training, strict=True):
            chunk.train(training)


def _teller(listener: Listener, total: int, each: int = 1) -> Tell:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more * each
        listener(Event("depth", done, total, "passes"))

    return tell


def _one_by_one(measure: Measure, singles: dict[int, float], steps: int, best_of: Any) -> tuple[tuple[int, float], ...]:
    """The greedy order; singles: layer -> the metric without it alone."""
    order: list[tuple[int, float]] = []
    for step in range(steps):
        if step:
            gone = [layer for layer, _ in order]
            rest = [layer for layer in singles if layer not in gone]
            singles = dict(zip(rest, measure(gone, [(layer,) for layer in rest]), strict=True))
            expect_finite({(layer, 1): value for layer, value in singles.items()})
        best = best_of(singles, key=singles.__getitem__)
        order.append((best, singles[best]))
    return tuple(order)


def _by_function(model: Any, metric: Metric, tell: Tell) -> Measure:
    def measure(gone: Layers, blocks: Sequence[Layers]) -> list[float]:
        values = []
        for block in blocks if gone else [(), *blocks]:
            values.append(float(metric(partial(forward_only, model, without=(*gone, *block)))))
            tell(1)
        return values

    return measure


def _by_loss(model: Any, batches: Sequence[Batch], metric: str, tokens: int, topology: Topology, tell: Tell) -> Measure:
    if metric not in LOSSES:
        raise PlanError(
            f"metric {metric!r} is not known.{did_you_mean(metric, LOSSES)} Use {' or '.join(LOSSES)}, or a function."
        )

    def measure(gone: Layers, blocks: Sequence[Layers]) -> list[float]:
        sums = torch.zeros(1 + len(blocks), dtype=torch.float64, device=topology.device)
        for window in windows(batches, topology.pp):
            hidden, kept = forward_kept(model, window, without=gone)
            whole = forward_only(model, window) if gone and metric == "kl" else hidden
            value_of = partial(_kl, topology, whole) if metric == "kl" else partial(_loss, topology)
            if not gone:
                chunk = chunks_of(model)[-1]
                sums[0] += sum(value_of(chunk, h, b, i) for i, (h, b) in enumerate(zip(hidden, window, strict=False)))
            sums[1:] += forward_rest(model, window, kept, blocks, value_of, without=gone).sum(1)
            tell(len(window) * (len(blocks) + (not gone)))
        total = sum_over_world(sums * (topology.is_last_stage and topology.tp_rank == 0)) / max(tokens, 1)
        return total[1:].tolist() if gone else total.tolist()

    return measure


def _loss(topology: Topology, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
    return lm_loss(
        hidden,
        output_weight(chunk).detach(),
        batch.labels,
        batch.mask,
        vocab=config_of(chunk).shape.vocab,
        group=topology.tp_group,
        sequence_parallel=topology.sequence_parallel,
    )


def _kl(topology: Topology, whole: Sequence[Tensor], chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
    """whole: the final hidden states of the whole network."""
    weight = output_weight(chunk).detach()
    return distill_loss(
        hidden,
        weight,
        whole[index],
        weight,
        batch.mask,
        vocab=config_of(chunk).shape.vocab,
        group=topology.tp_group,
        sequence_parallel=topology.sequence_parallel,
    )
