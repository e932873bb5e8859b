"""Estimate the cost of a recipe from shapes alone, without GPU and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import TypedDict

from .. import numbers
from ..convert import read_config
from ..errors import TopologyError, expect_number
from ..gpus import GPUS, MFU
from ..layout import Shape, flops_per_token, kv_cache_bytes, parameters
from ..model import is_megatron_checkpoint
from ..recipe import Recipe, light_recipe, resolved, with_keys, with_keys_in_errors
from ..score import DEPTH_METRICS
from ..search import Candidate
from ..serve import client_notes, client_warnings
from .check import check, planned
from .memory import WEIGHT_BYTES, RankMemory, memory_by_rank, rank_memory
from .model_folders import with_model_folders
from .refit_cost import RefitCost, refit_cost
from .sizes import Sizes, sizes_of

__all__ = ["Estimate", "count", "estimate"]

GPU = "H100"
"""GPU that an estimate assumes; its peak is that of dense bf16."""


class CandidateRow(TypedDict):
    """Costs of a candidate, and the hours of its light distillation."""

    name: str
    costs: dict[str, float]
    hours: float


@dataclass(frozen=True)
class Estimate:
    """Shapes, memory, FLOPs and time of a run on `gpus` processes."""

    teacher: Shape
    student: Shape
    gpus: int
    teacher_parameters: int
    student_parameters: int
    ranks: tuple[RankMemory, ...]
    """Memory of each pipeline stage's ranks by kind, without activations: in distillation the weights of both models,
    the student's gradients and optimizer, and the teacher's hidden states; or, if more, the teacher's correction."""
    stash_bytes: int
    """Memory for the teacher's final hidden states of a step, on a rank of the last pipeline stage."""
    disk_bytes: int
    """Disk space of all models that the run writes."""
    kv_cache_bytes: int
    """The student's KV cache in bf16, for one sequence of `data.sequence` tokens."""
    correct_tokens: int
    distill_tokens: int
    export_bytes: int
    """Bytes of the export's tensors."""
    flops: int
    """FLOPs of the whole run."""
    stage_flops: Mapping[str, int]
    """FLOPs of each stage that trains or scores, including the teacher's forward passes."""
    teacher_flops: int
    """FLOPs of the teacher in one distillation: its forward passes, and its training where it is corrected
    continuously."""
    refit_bytes: int
    """Bytes of the fullest rank in a refit; without one 0."""
    refit_host_bytes: int
    """Host memory per rank in a refit."""
    hours: float
    mfu: float
    """Share of the GPUs' peak that the hours assume."""
    candidates: tuple[Candidate, ...]
    """Candidates of a search, the largest first. `student` is then the first of them, and `flops` an upper bound."""
    light_flops: Mapping[str, int]
    """Candidate -> FLOPs of its light distillation."""
    warnings: tuple[str, ...]
    """Clients that cannot serve the export."""
    notes: tuple[str, ...]
    """The same for clients that the guide does not serve with, and stages whose cost is not counted."""

    @property
    def rank_bytes(self) -> int:
        """Peak memory of the fullest rank, without activations."""
        return max(each.total for each in self.ranks)

    def expect_to_fit(self, gib: float) -> None:
        """Raise TopologyError if a rank holds more than `gib` GiB, without activations."""
        expect_number("the memory of a GPU", gib, above=0)
        most = max(self.rank_bytes, self.refit_bytes)
        if most > gib * 2**30:
            raise TopologyError(
                f"a rank needs {most / 2**30:.1f} GiB before activations, but has {gib:g} GiB. Raise "
                "parallel.tp or pp, or save teacher memory (distill.offload_teacher, teacher_dtype, teacher_window)."
            )

    def only(self, until: str) -> Estimate:
        """Return the estimate of a run that ends with a stage: its FLOPs, tokens and hours."""
        names = list(self.stage_flops)
        kept = {name: self.stage_flops[name] for name in names[: names.index(until) + 1]}
        flops = sum(kept.values())
        hours = self.hours * flops / self.flops if self.flops else 0.0
        return replace(self, flops=flops, stage_flops=kept, hours=hours, distill_tokens=0)

    def predictions(self) -> dict[str, object]:
        """Return the predictions that a report compares with measurements: parameters, bytes, and FLOPs by stage."""
        smaller = dict.fromkeys(("pruned", "distilled", "random", "export"), self.student_parameters)
        return {
            "parameters": {"teacher": self.teacher_parameters, "corrected": self.teacher_parameters, **smaller},
            "export_bytes": self.export_bytes,
            "rank_bytes": self.rank_bytes,
            "flops": dict(self.stage_flops),
            "teacher_flops": self.teacher_flops,
        }

    def candidate_rows(self) -> list[CandidateRow]:
        """Return a row per candidate: name, costs, and hours of its light distillation."""
        rate = self.hours / self.flops if self.flops else 0.0
        return [
            {"name": each.name, "costs": dict(each.costs), "hours": self.light_flops.get(each.name, 0) * rate}
            for each in self.candidates
        ]

    def rank_rows(self) -> dict[str, Mapping[str, int]]:
        """Return a name of alike ranks -> their bytes by kind."""
        return memory_by_rank(self.ranks)

    def rows(self) -> dict[str, str]:
        """Return the estimate as label -> text."""
        rows = {
            "teacher": f"{self.teacher_parameters:,} parameters",
            "student": f"{self.student_parameters:,} parameters",
            "student shape": _shape_text(self.student),
            "memory per rank": f"{numbers.size(self.rank_bytes)} before activations",
            "of which teacher states": numbers.size(self.stash_bytes),
            "memory per rank, refit": f"{numbers.size(self.refit_bytes)}, host {numbers.size(self.refit_host_bytes)}",
            "disk": numbers.size(self.disk_bytes),
            "KV cache per sequence": numbers.size(self.kv_cache_bytes),
            "teacher correction": f"{self.correct_tokens:,} tokens",
            "distillation": f"{self.distill_tokens:,} tokens",
            "compute": numbers.flops(self.flops),
            "time": f"{numbers.duration(3600 * self.hours)} on {self._assumed_gpus()}",
        }
        if not self.refit_bytes:
            del rows["memory per rank, refit"]
        return rows | {
            name: " ".join(each) for name, each in (("warning", self.warnings), ("note", self.notes)) if each
        }

    def _assumed_gpus(self) -> str:
        """Return the GPUs that the hours are of: their number, kind and assumed speed."""
        gpus = "GPU" if self.gpus == 1 else "GPUs"
        return f"{self.gpus} {GPU} {gpus} at {self.mfu:.0%} of {numbers.flops(GPUS[GPU].flops)}/s"


def _shape_text(shape: Shape) -> str:
    heads = f"{shape.heads} query heads and {shape.kv_groups} key-value heads of {shape.head_dim}"
    return f"{numbers.counted(shape.layers, 'layer')}, hidden {shape.hidden}, ffn {shape.ffn}, {heads}"


@with_keys_in_errors()
def estimate(recipe: Recipe, *, gpus: int | None = None, mfu: float = MFU) -> Estimate:
    """Estimate a recipe, after the checks that `run` makes. Needs no weights and no GPU.

    gpus: number of processes, by default the fewest that the layout needs. mfu: model FLOPs utilisation, the share of
    the peak that is reached. Raises MinitronErrors as `run` does.
    """
    expect_number("mfu", mfu, above=0, at_most=1)
    if gpus is not None:
        expect_number("gpus", gpus, at_least=1, whole=True)
    topology = planned(recipe, gpus)
    check(recipe, topology, counts_only=True)
    return count(recipe, gpus=topology.world, mfu=mfu)


def count(recipe: Recipe, *, gpus: int, mfu: float = MFU) -> Estimate:
    """Estimate a recipe that was checked."""
    imported = [key for key, place in recipe.models.items() if is_megatron_checkpoint(place)]
    recipe = with_model_folders(recipe)
    config = read_config(recipe.model)
    served = read_config(recipe.student) if recipe.student else config
    sizes = sizes_of(recipe, config.shape)
    teacher, student = sizes.teacher, sizes.student
    parallel, weight = recipe.parallel, WEIGHT_BYTES[recipe.dtype]
    replicas = max(1, gpus // (parallel.tp * parallel.pp * parallel.cp))
    stash = _stash_bytes(recipe, teacher, replicas)
    light, refit = _light_flops(recipe, sizes), refit_cost(recipe, sizes, replicas * parallel.cp)
    stage_flops = _stage_flops(recipe, sizes, refit, light)
    flops = sum(stage_flops.values())
    work = flops + refit.delay
    written = 1 + (recipe.student is None) + recipe.random_baseline + (recipe.prune.refit != "none") + len(recipe.align)
    models = parameters(student) * (weight * written + WEIGHT_BYTES[recipe.export.dtype])
    return Estimate(
        teacher=teacher,
        student=student,
        gpus=gpus,
        teacher_parameters=parameters(teacher),
        student_parameters=parameters(student),
        ranks=rank_memory(recipe, teacher, student, gpus, stash),
        stash_bytes=stash,
        disk_bytes=models
        + (parameters(teacher) * weight if recipe.corrects_first else 0)
        + sum(map(_stored_bytes, (recipe.models[key] for key in imported))),
        kv_cache_bytes=kv_cache_bytes(student, 1, recipe.data.sequence),
        correct_tokens=_corrected_tokens(recipe),
        distill_tokens=sum(phase.tokens for phase in resolved(recipe.distill, recipe.data)),
        export_bytes=parameters(student) * WEIGHT_BYTES[recipe.export.dtype],
        flops=flops,
        stage_flops=stage_flops,
        teacher_flops=_teacher_flops(recipe, teacher),
        refit_bytes=refit.rank_bytes,
        refit_host_bytes=refit.host_bytes,
        hours=work / (gpus * GPUS[GPU].flops * mfu) / 3600,
        mfu=mfu,
        candidates=sizes.candidates,
        light_flops=light,
        warnings=tuple(map(with_keys, client_warnings(served, student, recipe.export.architecture))),
        notes=(*client_notes(served, student, recipe.export.architecture), *_uncounted(recipe)),
    )


def _uncounted(recipe: Recipe) -> list[str]:
    told = "Tokens, FLOPs and hours of align are not counted, and its memory only as in distillation."
    return [told] if recipe.align else []


def _stored_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights on disk."""
    config = read_config(folder)
    return parameters(config.shape) * WEIGHT_BYTES.get(config.source["torch_dtype"], 4)


def _corrected_tokens(recipe: Recipe) -> int:
    """Return the tokens on which the teacher is corrected before anything else."""
    return resolved(recipe.correct, recipe.data)[0].tokens if recipe.correct and recipe.corrects_first else 0


def _stash_bytes(recipe: Recipe, teacher: Shape, replicas: int) -> int:
    """Return the bytes of the teacher's final hidden states that wait for the student, in the largest phase."""
    if not recipe.distill.has_teacher:
        return 0
    parallel, window = recipe.parallel, recipe.distill.teacher_window
    ahead = max(
        min(phase.keys.global_batch // replicas, (window or phase.keys.global_batch) * phase.keys.micro_batch)
        * phase.sequence
        for phase in resolved(recipe.distill, recipe.data)
    )
    split = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    return ahead * teacher.hidden * WEIGHT_BYTES[recipe.frozen_teacher_dtype] // split


def _teacher_flops(recipe: Recipe, teacher: Shape) -> int:
    """Return the teacher's FLOPs in one distillation; a continuously corrected one trains there. Without a
    teacher: 0."""
    if not recipe.distill.has_teacher:
        return 0
    passes = 3 if recipe.correct and recipe.correct.continuous else 1
    return passes * _phase_flops(recipe, teacher)


def _phase_flops(recipe: Recipe, shape: Shape) -> int:
    """Return the FLOPs of one pass of a model over the tokens of all phases of distillation."""
    return sum(flops_per_token(shape, phase.sequence) * phase.tokens for phase in resolved(recipe.distill, recipe.data))


def _stage_flops(recipe: Recipe, sizes: Sizes, refit: RefitCost, light: Mapping[str, int]) -> dict[str, int]:
    """Return the FLOPs of each stage that trains, scores or refits. light: training of a search's candidates."""
    sequence = recipe.data.sequence
    distillation = 3 * _phase_flops(recipe, sizes.student) + _teacher_flops(recipe, sizes.teacher)
    return {
        "correct": 3 * flops_per_token(sizes.teacher, sequence) * _corrected_tokens(recipe),
        "score": _score_flops(recipe, sizes) * recipe.score.samples * sequence,
        "search": _search_flops(recipe, sizes, light) + refit.search_flops,
        "prune": refit.prune_flops,
        "distill": distillation,
        "baseline": distillation if recipe.random_baseline else 0,
    }


def _score_flops(recipe: Recipe, sizes: Sizes) -> int:
    """Return FLOPs per calibration token: a pass per round for the units, and the remaining layers of each network
    without a block."""
    sequence, sweep, teacher = recipe.data.sequence, sizes.sweep, sizes.teacher
    widths = [teacher] if recipe.needs_scores else []
    total = sum(flops_per_token(shape, sequence) for shape in [*widths, *sizes.rounds[:-1]])
    if sweep is not None:
        there = teacher.layers
        blocks = [(first, length) for length in sweep.lengths for first in range(there - length + 1)]
        left_out = [] if DEPTH_METRICS[sweep.metric].one_pass else blocks
        behind = [there, *(there - first - length for first, length in left_out)]
        behind += [left for gone in range(1, sweep.greedy) for left in (there - gone, *range(there - gone))]
        first, layer = _flops_of_layers(teacher, sequence)
        total += sum(first + left * layer for left in behind)
    return total


def _flops_of_layers(teacher: Shape, sequence: int) -> tuple[int, int]:
    """Return FLOPs per token of a network without layers, and those of one layer."""
    one, two = (flops_per_token(teacher.resized(layers=layers), sequence) for layers in (1, 2))
    return one - (two - one), two - one


def _light_flops(recipe: Recipe, sizes: Sizes) -> dict[str, int]:
    """Return the FLOPs of each candidate's light distillation, including the teacher's passes."""
    if recipe.search is None or recipe.search.light is None:
        return {}
    keys = light_recipe(recipe).distill
    [phase] = resolved(keys, recipe.data)
    taught = flops_per_token(sizes.teacher, phase.sequence) if keys.has_teacher else 0
    return {
        each.name: (3 * flops_per_token(each.shape, phase.sequence) + taught) * phase.tokens
        for each in sizes.candidates
    }


def _search_flops(recipe: Recipe, sizes: Sizes, light: Mapping[str, int]) -> int:
    """Return the FLOPs of a search: one pass of each candidate over the calibration samples, and light distillation of
    the most expensive ones, without refits."""
    sequence = recipe.data.sequence
    passes = sum(flops_per_token(each.shape, sequence) for each in sizes.candidates) * recipe.score.samples * sequence
    top = recipe.search.light.top if recipe.search and recipe.search.light else None
    return passes + sum(sorted(light.values(), reverse=True)[:top])
