"""The loss of every candidate right after its cut: from one loaded teacher, a candidate in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..data import Batch
from ..events import Event, Listener, silent
from ..model import chunks_of
from ..parallel import Topology, fail_together, gather_objects
from ..prune import check_cut, realise
from ..records import Plan
from ..train import LMObjective, mean_loss

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
    repair: Callable[[Any, Plan], None] | None = None,
    score: Callable[[Any], float] | None = None,
    tell: Callable[[str, Found], None] = lambda name, found: None,
    listener: Listener = silent,
) -> dict[str, Found]:
    """What is measured of each candidate: a cut of `model`, which stays as it is.

    batches: all samples, on every rank alike. repair: changes a candidate before it is measured. Data-parallel replicas
    measure candidates of their own; where experts are spread over them, or `repair` or `score` is asked for too (both
    collective over the world, of a candidate's chunks), all measure each together. tell: called on one rank of a
    replica, or of all, once a candidate is measured. Besides the model, one candidate is in memory, and what it has
    whole it shares with the model. Every rank returns the same. Collective over the world. Raises PlanError where the
    plans are for another model.
    """
    with fail_together():
        check_cut(model, plan_of(names[0]), topology)
    apart = topology.ep == 1 and score is None and repair is None
    mine = names[topology.dp_rank :: topology.dp] if apart else names
    first = topology.tp_rank == topology.pp_rank == 0 and (apart or topology.dp_rank == 0)
    found: dict[str, Found] = {}
    for number, name in enumerate(mine, 1):
        found[name] = _measured(_candidate(model, plan_of(name), topology, repair), batches, topology, score)
        if first:
            tell(name, found[name])
        through = min(len(names), number * topology.dp) if apart else number
        loss = found[name]["loss"]
        listener(Event("search", through, len(names), "candidates", {"after_cut": math.nan if loss is None else loss}))
    every = {name: part for each in gather_objects(found) for name, part in each.items()}
    return {name: every[name] for name in names}


def _candidate(model: Any, plan: Plan, topology: Topology, repair: Callable[[Any, Plan], None] | None) -> Any:
    candidate = realise(model, plan, topology)
    if repair:
        repair(candidate, plan)
    return candidate


def _measured(
    candidate: Any, batches: Sequence[Batch], topology: Topology, score: Callable[[Any], float] | None
) -> Found:
    for chunk in chunks_of(candidate):
        chunk.eval()
    loss, _ = mean_loss(candidate, batches, LMObjective(topology), topology, topology.model_group)
    found: Found = {"loss": loss if math.isfinite(loss) else None}
    return found if score is None else {**found, "score": score(candidate)}
