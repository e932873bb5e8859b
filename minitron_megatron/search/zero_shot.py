"""Loss of every candidate right after its cut, from one loaded teacher, with one candidate in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..data import Batch
from ..events import Event, Listener, silent
from ..model import Chunk, Model, evaluating
from ..parallel import Topology, fail_together, gather_objects
from ..prune import check_cut, trimmed_view
from ..records import Plan
from ..train import LMObjective, mean_loss

__all__ = ["zero_shot"]

Found = dict[str, float | None]
"""`loss`: nats per token, None if it is not finite; `score`, if requested."""


def zero_shot(
    model: Model,
    names: Sequence[str],
    plan_of: Callable[[str], Plan],
    batches: Sequence[Batch],
    *,
    topology: Topology,
    repair: Callable[[list[Chunk], Plan], None] | None = None,
    score: Callable[[list[Chunk]], float] | None = None,
    tell: Callable[[str, Found], None] = lambda name, found: None,
    listener: Listener = silent,
) -> dict[str, Found]:
    """Measure each candidate, a cut of `model`; the model itself is not changed.

    batches: all samples, the same on every rank. Each data-parallel replica measures its own share of the candidates,
    unless experts are spread over replicas or `repair` or `score` is given: then all ranks measure every candidate
    together. repair: changes a candidate before it is measured; score: function of a candidate's chunks; both are
    collective over the world. tell: called once for each measured candidate, on one
    rank of the replica (or of the world). Only one candidate is in memory besides the model; it shares uncut parameters
    with the model. Every rank returns the same. Collective over the world. Raises PlanError if the plans are for
    another model.
    """
    with fail_together():
        check_cut(model, plan_of(names[0]), topology)
    by_replica = topology.ep == 1 and score is None and repair is None
    own_names = names[topology.dp_rank :: topology.dp] if by_replica else names
    first = topology.tp_rank == topology.pp_rank == 0 and (by_replica or topology.dp_rank == 0)
    found: dict[str, Found] = {}
    for number, name in enumerate(own_names, 1):
        found[name] = _measured(_candidate(model, plan_of(name), topology, repair), batches, topology, score)
        if first:
            tell(name, found[name])
        done = min(len(names), number * topology.dp) if by_replica else number
        loss = found[name]["loss"]
        listener(Event("search", done, len(names), "candidates", {"after_cut": math.nan if loss is None else loss}))
    every = {name: part for each in gather_objects(found) for name, part in each.items()}
    return {name: every[name] for name in names}


def _candidate(
    model: Model, plan: Plan, topology: Topology, repair: Callable[[list[Chunk], Plan], None] | None
) -> list[Chunk]:
    candidate = trimmed_view(model, plan, topology)
    if repair:
        repair(candidate, plan)
    return candidate


def _measured(
    candidate: list[Chunk], batches: Sequence[Batch], topology: Topology, score: Callable[[list[Chunk]], float] | None
) -> Found:
    with evaluating(candidate):
        loss, _ = mean_loss(candidate, batches, LMObjective(topology), topology, topology.model_group)
    found: Found = {"loss": loss if math.isfinite(loss) else None}
    return found if score is None else {**found, "score": score(candidate)}
