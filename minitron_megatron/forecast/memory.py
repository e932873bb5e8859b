"""Memory of weights, gradients and optimizer on a rank, counted from the layout table without starting a process.

Activations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from ..distill import is_packed
from ..layout import Shape, expert_of, layer_of, lookup
from ..parallel import Topology
from ..recipe import Recipe

__all__ = [
    "WEIGHT_BYTES",
    "RankMemory",
    "memory_by_rank",
    "model_bytes",
    "rank_memory",
    "rank_parameters",
    "training_parts",
]

Parts = Mapping[str, float]
"""Kind -> bytes."""


WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two fp32 moments, and an fp32 master copy of bf16 weights; sharded over data-parallel ranks."""


def rank_parameters(shape: Shape, topology: Topology) -> list[tuple[int, int]]:
    """Return (non-expert parameters, expert parameters) of a rank of each pipeline stage.

    The vocabulary is padded, and a tied embedding counts on both stages that hold it. Raises TopologyError if there
    are fewer layers than stages.
    """
    return _weighted_parameters(shape, topology, lambda name: 1)


def _weighted_parameters(shape: Shape, topology: Topology, weigh: Callable[[str], int]) -> list[tuple[int, int]]:
    """Return the same, each parameter multiplied by the weight of its name."""
    sizes, held = shape.sizes(), [[0, 0] for _ in range(topology.pp)]
    stage_of = {layer: at % topology.pp for at, layers in enumerate(topology.stages(shape.layers)) for layer in layers}
    for name in shape.names():
        param, layer, of_expert = lookup(name), layer_of(name), expert_of(name) is not None
        ends = {"embedding.word_embeddings.weight": {0, topology.pp - 1} if shape.tied else {0}}
        split = topology.ep if of_expert else topology.tp if param.tp else 1
        for stage in ends.get(name, {topology.pp - 1}) if layer is None else (stage_of[layer],):
            held[stage][of_expert] += prod(param.shape(sizes)) // split * weigh(name)
    return [(dense, experts) for dense, experts in held]


def model_bytes(shape: Shape, topology: Topology, dtype: str, *, packed: bool = False) -> list[int]:
    """Return the bytes of the weights on a rank of each pipeline stage. packed: the layers' matrices in float8."""

    def weigh(name: str) -> int:
        return 1 if packed and is_packed(name) else WEIGHT_BYTES[dtype]

    return [sum(pair) for pair in _weighted_parameters(shape, topology, weigh)]


def training_parts(shape: Shape, topology: Topology, dtype: str, world: int) -> list[dict[str, float]]:
    """Return the bytes of weights, gradients and optimizer shard on a rank of each pipeline stage, by kind."""
    stage, optimizer = max(1, world // topology.pp), OPTIMIZER_BYTES[dtype]
    dp, edp = max(1, stage // topology.tp), max(1, stage // topology.ep)
    return [
        {
            "weights": (dense + experts) * WEIGHT_BYTES[dtype],
            "gradients": (dense + experts) * GRADIENT_BYTES,
            "optimizer": dense * optimizer / dp + experts * optimizer / edp,
        }
        for dense, experts in rank_parameters(shape, topology)
    ]


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
