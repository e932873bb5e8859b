"""The loss of every candidate right after its cut: from one loaded teacher, a candidate in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data import Batch
from ..events import Event, Listener, silent
from ..losses import lm_loss
from ..model import chunks_of, config_of, forward_only, output_weight, windows
from ..parallel import Topology, all_reduce, fail_together, gather_objects
from ..prune import check_cut, realise
from ..records import Plan

__all__ = ["zero_shot"]

Found = dict[str, float | None]
"""`loss`: nats per token, None where it is not finite; `score`, where one is asked for."""


def zero_shot(
    model: Any,
    names: Sequence[str],
    plan_of: Callable[[str], Plan],
    batches: Sequence[Batch],
    *,
    topology: Topology,
    score: Callable[[Any], float] | None = None,
    tell: Callable[[str, Found], None] = lambda name, found: None,
    listener: Listener = silent,
) -> dict[str, Found]:
    """What is measured of each candidate: a cut of `model`, which stays as it is.

    batches: all samples, on every rank alike. Data-parallel replicas measure candidates of their own; where experts are
    spread over them, or `score` is asked for too (collective over the world, of a candidate's chunks), all measure
    each together. tell: called on one rank of a replica, or of all, once a candidate is measured. Besides the model,
    one candidate is in memory, and what it has whole it shares with the model. Every rank returns the same. Collective
    over the world. Raises PlanError where the plans are for another model.
    """
    with fail_together():
        check_cut(model, plan_of(names[0]), topology)
    apart = topology.ep == 1 and score is None
    mine = names[topology.dp_rank :: topology.dp] if apart else names
    first = topology.tp_rank == topology.pp_rank == 0 and (apart or topology.dp_rank == 0)
    found: dict[str, Found] = {}
    for number, name in enumerate(mine, 1):
        found[name] = _measured(realise(model, plan_of(name), topology), batches, topology, score)
        if first:
            tell(name, found[name])
        through = min(len(names), number * topology.dp) if apart else number
        listener(Event("search", through, len(names), "candidates", {"after_cut": found[name]["loss"] or math.nan}))
    every = {name: part for each in gather_objects(found) for name, part in each.items()}
    return {name: every[name] for name in names}


def _measured(
    candidate: Any, batches: Sequence[Batch], topology: Topology, score: Callable[[Any], float] | None
) -> Found:
    loss = _loss(candidate, batches, topology)
    found: Found = {"loss": loss if math.isfinite(loss) else None}
    return found if score is None else {**found, "score": score(candidate)}


def _loss(candidate: Any, batches: Sequence[Batch], topology: Topology) -> float:
    """Nats per token over all batches. Collective over the ranks that hold one copy of the candidate."""
    for chunk in chunks_of(candidate):
        chunk.eval()
    last = chunks_of(candidate)[-1]
    sums = torch.zeros(2, dtype=torch.float64, device=topology.device)
    with torch.no_grad():
        for window in windows(batches, topology.pp):
            hidden = forward_only(candidate, window)
            for batch, states in zip(window, hidden, strict=False):  # none before the last pipeline stage
                loss = lm_loss(
                    states,
                    output_weight(last).detach(),
                    batch.labels,
                    batch.mask,
                    vocab=config_of(last).shape.vocab,
                    group=topology.tp_group,
                    sequence_parallel=topology.sequence_parallel,
                )
                sums += torch.stack([loss.double(), batch.mask.sum().double()])
    sums *= topology.is_last_stage and topology.tp_rank == 0
    total, tokens = all_reduce(sums, topology.model_group).tolist()
    return float(total / max(tokens, 1))
