"""Toy stages and options on a rehearsed rank, called in a process of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minitron_megatron.align import PairLoss, PreferenceObjective
from minitron_megatron.align.pairs import Pair, pair_batch
from minitron_megatron.convert import save_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import merge_heads, random_plan, trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.refit import refit
from minitron_megatron.rehearsal import (
    Ledger,
    PlannedLayout,
    Section,
    advice,
    plan_layouts,
    rehearse,
    rehearsed_rank,
    smallest_change,
)
from minitron_megatron.score import score
from minitron_megatron.search import zero_shot
from minitron_megatron.train import Learner, Training
from tests.rehearsal.steps import SEQUENCE, TEACHER, batches, empty

__all__ = ["ROOMS", "advised", "in_room", "planned_layouts", "rehearsed_stage", "settle"]

CUT = {"hidden": 48, "ffn": 64}


def settle() -> None:
    """Rehearse once, and exclude what was imported from the garbage collections of later rehearsals."""
    in_room("prune")
    gc.collect()
    gc.freeze()


def rehearsed_stage(recipe: Path, overrides: Sequence[str], gpus: int, stage: str = "distill") -> dict[str, Any]:
    """Rehearse a stage as the last kind of rank; return its JSON."""
    found = rehearse(load_recipe(recipe, overrides), gpus=gpus, stage=stage, kinds=lambda kinds: kinds[-1:])
    return dict(found.detailed()["ranks"][0])


def advised(recipe: Path, overrides: Sequence[str], gpus: int, memory: float) -> str:
    """Return what the error of a recipe that does not fit advises."""
    loaded = load_recipe(recipe, overrides)
    found = rehearse(loaded, gpus=gpus, memory=memory)
    assert not found.fits
    return advice(smallest_change(loaded, found))


def planned_layouts(recipe: Path, overrides: Sequence[str], gpus: int, memory: float) -> list[tuple[str, str, float]]:
    """Return text, keys and seconds of the layouts of a plan."""
    found: list[PlannedLayout] = plan_layouts(load_recipe(recipe, overrides), gpus=gpus, memory=memory)
    assert all(each.found.worst.peak <= memory * 2**30 and each.by_formula > 0 for each in found)
    return [(str(each.layout), each.layout.block(), each.found.seconds) for each in found]


def in_room(name: str) -> tuple[int, Section]:
    """Run what a room does on the first rank of tp 2; return the bytes alive before it, and its section."""
    with rehearsed_rank(0, 2, ledger=Ledger(block=1)) as ledger:
        topology = Topology.start(tp=2)
        try:
            before = ROOMS[name](topology, ledger)
        finally:
            topology.stop()
    return before, ledger.section


def _prune(topology: Topology, ledger: Ledger) -> int:
    model, plan = empty(TEACHER, topology), random_plan(TEACHER, 1, layers=(1,), **CUT)
    before = _begun(ledger)
    trim(model, plan, topology)
    return before


def _refit(topology: Topology, ledger: Ledger) -> int:
    teacher, student, plan = empty(TEACHER, topology), empty(TEACHER, topology), random_plan(TEACHER, 1, **CUT)
    student = trim(student, plan, topology)
    before = _begun(ledger)
    refit(student, teacher, plan, batches(topology), topology, ridges=(0.1,))
    return before


def _score(topology: Topology, ledger: Ledger) -> int:
    model = empty(TEACHER, topology)
    before = _begun(ledger)
    scores = score(model, batches(topology), topology=topology)
    merge_heads(model, scores, random_plan(TEACHER, 1, heads=2), topology, merge="q+o")
    return before


def _search(topology: Topology, ledger: Ledger) -> int:
    model, plan = empty(TEACHER, topology), random_plan(TEACHER, 1, **CUT)
    before = _begun(ledger)
    zero_shot(model, ["a"], lambda _: plan, batches(topology), topology=topology)
    return before


def _export(topology: Topology, ledger: Ledger) -> int:
    model = empty(TEACHER, topology)
    before = _begun(ledger)
    with TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model", topology)
    return before


def _begun(ledger: Ledger) -> int:
    ledger.begin()
    return ledger.now


def _align(loss: str) -> Callable[[Topology, Ledger], int]:
    def train(topology: Topology, ledger: Ledger) -> int:
        learner = Learner(empty(TEACHER, topology), Training(steps=2), topology)
        tokens = np.arange(8, dtype=np.int32)
        pairs = [Pair(tokens, (tokens[:4], tokens[:6]), np.ones(2))] * 2
        batch = pair_batch(pairs, SEQUENCE, np.zeros((2, 2), np.float32)).to(topology.device)
        objective = PreferenceObjective(topology, PairLoss(loss=loss))
        learner.step([batch], objective)
        before = _begun(ledger)
        learner.step([batch], objective)
        objective.finish()
        return before

    return train


ROOMS = {
    **{"prune": _prune, "refit": _refit, "score": _score, "search": _search, "export": _export},
    **{f"align by {loss}": _align(loss) for loss in ("dpo", "rpo_bwd_kl")},
}
"""Name -> what it does on a rank; the ledger's last section is its work."""
