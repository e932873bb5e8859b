"""What a recipe will take: counted from shapes alone, with no GPU and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..convert import read_config
from ..layout import Shape, flops_per_token, kv_cache_bytes, parameters
from .schema import Recipe, TrainingKeys
from .sizes import depth_sweep, round_shapes, scores_wanted, student_shape

__all__ = ["Estimate", "estimate"]

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two fp32 moments, and an fp32 master copy of bf16 weights; split over data-parallel ranks."""


@dataclass(frozen=True)
class Estimate:
    """Shapes, sizes and work of a run on `gpus` processes."""

    teacher: Shape
    student: Shape
    gpus: int
    teacher_parameters: int
    student_parameters: int
    rank_bytes: int
    """Weights of both models, the student's gradients and optimizer, and the teacher's stash, on the fullest rank."""
    stash_bytes: int
    """The teacher's final hidden states of a step, on a last-stage rank."""
    disk_bytes: int
    """Every model that the run writes."""
    kv_cache_bytes: int
    """The student's, bf16, for one sequence of `data.sequence` tokens."""
    correct_tokens: int
    distill_tokens: int
    export_bytes: int
    """Of the tensors of the export."""
    flops: int
    """Of the whole run; teacher forwards included."""
    stage_flops: Mapping[str, int]
    """Of the stages that train or score; of `distill`, the teacher's forward passes apart as `teacher`."""
    hours: float

    def predictions(self) -> dict[str, Any]:
        """What a report can set beside what was measured: parameters of each model, bytes, FLOPs of each stage."""
        smaller = dict.fromkeys(("pruned", "distilled", "random", "export"), self.student_parameters)
        return {
            "parameters": {"corrected": self.teacher_parameters, **smaller},
            "export_bytes": self.export_bytes,
            "rank_bytes": self.rank_bytes,
            "flops": dict(self.stage_flops),
        }

    def rows(self) -> dict[str, str]:
        """The estimate in words."""
        gib = 2**30
        return {
            "teacher": f"{self.teacher_parameters:,} parameters",
            "student": f"{self.student_parameters:,} parameters",
            "student shape": _say(self.student),
            "memory a rank": f"{self.rank_bytes / gib:.3f} GiB before activations",
            "of that, teacher states": f"{self.stash_bytes / gib:.3f} GiB",
            "disk": f"{self.disk_bytes / gib:.3f} GiB",
            "KV cache a sequence": f"{self.kv_cache_bytes / gib:.3f} GiB",
            "correction": f"{self.correct_tokens:,} tokens",
            "distillation": f"{self.distill_tokens:,} tokens",
            "work": f"{self.flops:.3g} FLOPs",
            "time": f"{self.hours:.3g} hours on {self.gpus} GPUs",
        }


def _say(shape: Shape) -> str:
    width = f"hidden {shape.hidden}, ffn {shape.ffn}, {shape.heads} heads in {shape.kv_groups} kv_groups"
    return f"{shape.layers} layers, {width} of {shape.head_dim}"


def estimate(recipe: Recipe, *, gpus: int | None = None, mfu: float = 0.4, peak_flops: float = 989e12) -> Estimate:
    """Counts a recipe.

    gpus: processes, by default tp * pp. mfu: the share reached of `peak_flops`, which is an H100's in dense bf16.
    """
    teacher = read_config(recipe.model).shape
    student = student_shape(recipe, teacher)
    keys, parallel = recipe.distill, recipe.parallel
    gpus = gpus or parallel.tp * parallel.pp
    dp = max(1, gpus // (parallel.tp * parallel.pp))
    sequence, weight = recipe.data.sequence, WEIGHT_BYTES[recipe.dtype]
    stash = (
        keys.global_batch
        // dp
        * sequence
        * teacher.hidden
        * weight
        // (parallel.tp if parallel.sequence_parallel else 1)
    )
    of_teacher, of_student = _rank_parameters(teacher, recipe), _rank_parameters(student, recipe)
    trained = weight + GRADIENT_BYTES + OPTIMIZER_BYTES[recipe.dtype] / dp
    forward = {shape: flops_per_token(shape, sequence) for shape in (teacher, student)}
    correct_tokens = _tokens(recipe.correct, sequence) if recipe.correct else 0
    distill_tokens = _tokens(keys, sequence)
    stage_flops = {
        "correct": 3 * forward[teacher] * correct_tokens,
        "score": _score_flops(recipe, teacher) * recipe.score.samples * sequence,
        "distill": 3 * forward[student] * distill_tokens,
        "teacher": forward[teacher] * distill_tokens,
    }
    flops = sum(stage_flops.values())
    models = parameters(student) * (weight * 2 + WEIGHT_BYTES[recipe.export.dtype])
    return Estimate(
        teacher=teacher,
        student=student,
        gpus=gpus,
        teacher_parameters=parameters(teacher),
        student_parameters=parameters(student),
        rank_bytes=round(of_teacher * weight + of_student * trained + stash),
        stash_bytes=stash,
        disk_bytes=models + (parameters(teacher) * weight if recipe.correct else 0),
        kv_cache_bytes=kv_cache_bytes(student, 1, sequence),
        correct_tokens=correct_tokens,
        distill_tokens=distill_tokens,
        export_bytes=parameters(student) * WEIGHT_BYTES[recipe.export.dtype],
        flops=flops,
        stage_flops=stage_flops,
        hours=flops / (gpus * peak_flops * mfu) / 3600,
    )


def _score_flops(recipe: Recipe, teacher: Shape) -> int:
    """Of a calibration token: a pass for the units in each round, and what is left of every network without a block."""
    sequence, sweep = recipe.data.sequence, depth_sweep(recipe, teacher)
    passes = [teacher] if scores_wanted(recipe) else []
    passes += round_shapes(recipe, teacher)[:-1]
    if sweep is not None:
        there = teacher.layers
        blocks = [(first, length) for length in sweep.lengths for first in range(there - length + 1)]
        behind = [there] if sweep.metric == "bi" else [there, *(there - first - length for first, length in blocks)]
        behind += [left for gone in range(1, sweep.greedy) for left in (there - gone, *range(there - gone))]
        passes += [teacher.resized(layers=left) for left in behind]
    return sum(flops_per_token(shape, sequence) for shape in passes)


def _tokens(keys: TrainingKeys, sequence: int) -> int:
    return keys.steps(sequence) * keys.global_batch * sequence


def _rank_parameters(shape: Shape, recipe: Recipe) -> int:
    """Parameters on the fullest pipeline stage, a tp-th of them."""
    parallel = recipe.parallel
    ends = shape.padded_vocab * shape.hidden
    body = parameters(shape) - shape.vocab * shape.hidden * (1 if shape.tied else 2)
    layers = -(-shape.layers // parallel.pp) / shape.layers
    both = 1 if shape.tied and parallel.pp == 1 else 2 if parallel.pp == 1 else 1
    return round((body * layers + ends * both) / parallel.tp)
