"""Bytes of each rank by kind, at the stage of a run where it holds most; activations are not counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..layout import Shape
from ..parallel import Topology
from ..recipe import Recipe
from .memory import model_bytes, training_parts

__all__ = ["RankMemory", "memory_by_rank", "rank_memory"]

Parts = Mapping[str, float]


@dataclass(frozen=True)
class RankMemory:
    """Memory of the ranks of a pipeline stage, which hold equally much."""

    ranks: range
    pipeline_stage: int
    """Counted from 1."""
    during: str
    """Stage of the run: `correct` or `distill`."""
    held: Mapping[str, int]
    """Kind -> bytes."""

    @property
    def total(self) -> int:
        return sum(self.held.values())


def rank_memory(recipe: Recipe, teacher: Shape, student: Shape, world: int, stash: int) -> tuple[RankMemory, ...]:
    """Return the memory of each pipeline stage's ranks, in distillation or teacher correction, whichever holds more.

    stash: bytes of the teacher's hidden states on a rank of the last pipeline stage.
    """
    topology, each = Topology.of(recipe.parallel), max(1, world // recipe.parallel.pp)
    trained = _corrected(recipe, teacher, topology, world)
    distilled = _distilled(recipe, teacher, student, world, trained)
    if stash:
        distilled[-1]["teacher's hidden states"] = stash
    found = []
    for stage, (correct, distill) in enumerate(zip(trained, distilled, strict=True)):
        stages = {"distill": distill} | ({"correct": correct} if recipe.corrects_first else {})
        during = max(stages, key=lambda name: sum(stages[name].values()))
        held = {kind: round(size) for kind, size in stages[during].items()}
        found.append(RankMemory(range(stage * each, (stage + 1) * each), stage + 1, during, held))
    return tuple(found)


def _corrected(recipe: Recipe, teacher: Shape, topology: Topology, world: int) -> list[Parts]:
    """Return what the teacher's correction holds on each pipeline stage."""
    if recipe.correct and recipe.correct.parameters != "all":  # gradients are small; lora holds the weights twice
        copies = {"norms": 1, "lora": 2}[recipe.correct.parameters]
        return [{"teacher's weights": copies * each} for each in model_bytes(teacher, topology, recipe.dtype)]
    return [_of("teacher's", each) for each in training_parts(teacher, topology, recipe.dtype, world)]


def _distilled(
    recipe: Recipe, teacher: Shape, student: Shape, world: int, corrected: Sequence[Parts]
) -> list[dict[str, float]]:
    """Return what distillation holds on each pipeline stage, without the teacher's hidden states."""
    topology = Topology.of(recipe.parallel)
    learning = [_of("student's", each) for each in training_parts(student, topology, recipe.dtype, world)]
    if not recipe.distill.has_teacher:
        return learning
    packed = recipe.distill.teacher_dtype == "float8"
    frozen = model_bytes(teacher, topology, recipe.frozen_teacher_dtype, packed=packed)
    teaching: Sequence[Parts] = [{"teacher's weights": each} for each in frozen]
    if recipe.correct and recipe.correct.continuous:
        teaching = corrected
    return [{**teaches, **learns} for teaches, learns in zip(teaching, learning, strict=True)]


def _of(whose: str, parts: Parts) -> dict[str, float]:
    return {f"{whose} {kind}": size for kind, size in parts.items()}


def memory_by_rank(found: Sequence[RankMemory]) -> dict[str, Mapping[str, int]]:
    """Return a name -> bytes by kind, for each run of pipeline stages whose ranks hold equally much of everything."""
    rows = {}
    for _, group in groupby(found, key=lambda each: (each.during, [*each.held.items()])):
        alike = [*group]
        rows[_name(alike, len(found))] = alike[0].held
    return rows


def _name(alike: Sequence[RankMemory], stages: int) -> str:
    """Return the name of ranks that are alike: the ranks, their pipeline stages, and the stage of the run."""
    first, last = alike[0], alike[-1]
    place = f", {_span('pipeline stage', first.pipeline_stage, last.pipeline_stage)} of {stages}" if stages > 1 else ""
    return f"{_span('rank', first.ranks[0], last.ranks[-1])}{place}, in {first.during}"


def _span(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first} to {last}"
