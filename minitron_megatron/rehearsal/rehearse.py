"""Rehearsal of a recipe's stage on every distinct kind of rank of a cluster, at full size, without a GPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import RecipeError, TopologyError, did_you_mean, expect_number
from ..events import Event, Listener, silent
from ..forecast import check, count, planned, with_model_folders
from ..gpus import GPUS, Gpu
from ..parallel import PlannedTopology, Topology
from ..recipe import Recipe, resolved
from .clock import ASSUMED
from .fault import DeviceFault
from .ledger import Ledger, Section, Sums
from .machine import rehearsed_rank
from .stages import TRAINS, Rehearsed, rehearsable, run_stage

__all__ = ["RankKind", "Rehearsal", "rank_kinds", "rehearse"]

GIB = 2**30
COSTLY_LINES = 10


@dataclass(frozen=True)
class RankKind:
    """A rank that stands for all ranks that do the same work."""

    rank: int
    name: str
    place: tuple[bool, ...] = ()
    """Whether it is the last pipeline stage, tensor-parallel rank and context-parallel rank."""


@dataclass(frozen=True)
class RankResult:
    """Modelled work of one kind of rank: of a training step with all its micro-batches, or of the whole stage."""

    kind: RankKind
    section: Section
    loading: Section
    validation: Section | None
    micro_batch_seconds: float

    @property
    def fullest(self) -> Section:
        """Section with the most bytes alive at a time."""
        sections = (self.section, self.loading, self.validation)
        return max((each for each in sections if each is not None), key=lambda each: each.peak)

    @property
    def peak(self) -> int:
        """Most bytes alive at a time in any section."""
        return self.fullest.peak

    @property
    def seconds(self) -> float:
        return sum(self.section.by_resource.values())


@dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal. Every number is modelled, not measured."""

    stage: str
    gpus: int
    gpu: str
    memory: float
    """GiB of a GPU."""
    ranks: tuple[RankResult, ...]
    seconds: float
    """Seconds of a training step of the whole cluster, or of the stage where it does not train."""
    steps: int
    """Training steps; 1 for a stage that does not train."""
    tokens: int
    """Tokens of a training step over all ranks, or of the stage."""
    model_flops: float | None
    """FLOPs that the models need for these tokens, without recomputation; None for a stage that does not train."""

    @property
    def utilisation(self) -> float | None:
        """Share of the data sheet's bf16 peak that the models' own FLOPs reach."""
        if self.model_flops is None:
            return None
        return self.model_flops / (self.seconds * self.gpus * GPUS[self.gpu].flops)

    @property
    def hours(self) -> float:
        return self.seconds * self.steps / 3600

    @property
    def worst(self) -> RankResult:
        """The fullest kind of rank."""
        return max(self.ranks, key=lambda each: each.peak)

    @property
    def fits(self) -> bool:
        """Whether every kind of rank fits a GPU's memory."""
        return self.worst.peak <= self.memory * GIB

    def expect_to_fit(self, advice: str = "Raise parallel.tp or pp, or recompute more.") -> None:
        """Raise TopologyError that names the fullest kind of rank, its largest kinds of bytes and the advice, if a
        GPU's memory does not suffice."""
        if self.fits:
            return
        worst = self.worst
        over = worst.peak / GIB - self.memory
        kinds = sorted(worst.fullest.peak_by_kind.items(), key=lambda each: -each[1])[:3]
        largest = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in kinds)
        first = worst.section.over or worst.loading.over or "the teacher's states of all micro-batches"
        raise TopologyError(
            f"{worst.kind.name} needs {worst.peak / GIB:.2f} GiB (modelled, not measured), {over:.2f} GiB more than "
            f"the {self.memory:g} GiB of a GPU; the first tensor that does not fit: {first}; largest: {largest}. "
            + advice
        )

    def detailed(self) -> dict[str, object]:
        """Return the result as JSON, with each rank's seconds by line, and bytes over the seconds of the last step that
        was rehearsed."""
        ranks = [_rank_dict(each) | _rank_details(each.section) for each in self.ranks]
        return self.as_dict() | {"ranks": ranks}

    def as_dict(self) -> dict[str, object]:
        """Return the result as JSON."""
        return {
            "modelled, not measured": ASSUMED,
            "stage": self.stage,
            "gpus": self.gpus,
            "gpu": self.gpu,
            "memory_gib": self.memory,
            "seconds_of_a_step": self.seconds,
            "steps": self.steps,
            "tokens_of_a_step": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_second_per_gpu": self.tokens / self.seconds / self.gpus,
            "utilisation": self.utilisation,
            "hours": self.hours,
            "ranks": [_rank_dict(each) for each in self.ranks],
        }


def _rank_dict(found: RankResult) -> dict[str, object]:
    section = found.section
    return {
        "rank": found.kind.rank,
        "kind": found.kind.name,
        "peak_bytes": found.peak,
        "peak_bytes_by_kind": section.peak_by_kind,
        "peak_bytes_loading": found.loading.peak,
        "peak_bytes_validation": found.validation.peak if found.validation else None,
        "flops": sum(section.flops.values()),
        "bytes_touched": sum(section.touched.values()),
        "kernels": sum(section.kernels.values()),
        "host_waits": section.waits,
        "communication": {name: {"calls": section.calls[name], "bytes": size} for name, size in section.sent.items()},
        "seconds": section.by_resource,
        "costliest_lines": dict(sorted(section.seconds.items(), key=lambda each: -each[1])[:COSTLY_LINES]),
    }


def _rank_details(section: Section) -> dict[str, object]:
    return {"seconds_by_line": section.seconds, "bytes_over_seconds": section.timeline.finished(section.elapsed)}


def rank_kinds(topology: PlannedTopology) -> list[RankKind]:
    """Return a rank for each distinct kind: pipeline stages (first, one in the middle, last), tensor-parallel ranks
    (first, last) and context-parallel ranks (first, last). Data-parallel ranks and experts are alike."""
    pp, tp, cp = (_ends(size) for size in (topology.pp, topology.tp, topology.cp))
    pp = sorted({*pp, 1} if topology.pp > 2 else pp)
    return [
        RankKind(
            topology.rank_at(stage, shard, part),
            _kind_name(topology, stage, shard, part),
            (stage == topology.pp - 1, shard == topology.tp - 1, part == topology.cp - 1),
        )
        for stage in pp
        for shard in tp
        for part in cp
    ]


def _ends(size: int) -> list[int]:
    return sorted({0, size - 1})


def _kind_name(topology: PlannedTopology, stage: int, shard: int, part: int) -> str:
    places = {"pipeline stage": (stage, topology.pp), "tp": (shard, topology.tp), "cp": (part, topology.cp)}
    return ", ".join(f"{name} {at + 1} of {size}" for name, (at, size) in places.items() if size > 1) or "every rank"


def rehearse(
    recipe: Recipe,
    *,
    gpus: int,
    gpu: str = "H100",
    memory: float = 80.0,
    stage: str = "distill",
    kinds: Callable[[list[RankKind]], Sequence[RankKind]] = list,
    stops_when_full: bool = False,
    listener: Listener = silent,
) -> Rehearsal:
    """Rehearse a stage of a recipe on every kind of rank, after the checks that `run` makes.

    gpu: a name in `GPUS`. memory: GiB of a GPU. kinds: chooses kinds of rank, at least one; time and utilisation are
    then those of a cluster of these. stops_when_full: raise DeviceFull at the first tensor that does not fit. Needs no
    GPU and no weights, but a process of its own that has not run on the CPU. Raises DeviceFault that names the kind of
    rank where an operation would fail on a GPU, and MinitronErrors as `estimate` does.
    """
    expect_number("gpus", gpus, at_least=1, whole=True)
    expect_number("memory", memory, above=0)
    gpu_named(gpu)
    topology = planned(recipe, gpus)
    check(recipe, topology, counts_only=True)
    recipe = with_model_folders(recipe)
    short = rehearsable(recipe, stage)
    chosen = kinds(rank_kinds(topology))
    results, pieces = [], []
    for number, kind in enumerate(chosen, 1):
        ledger = Ledger(limit=int(memory * GIB), stops_when_full=stops_when_full)
        piece = _on_rank(short, stage, kind, topology, gpu, ledger)
        results.append(_result(kind, piece))
        pieces.append(piece)
        listener(Event("rehearse", number, len(chosen), "kinds of rank"))
    passes = pieces[0].micro_batches * pieces[0].repeats
    tokens = passes * pieces[0].tokens * (topology.replicas if stage in TRAINS else topology.dp)
    return Rehearsal(
        stage,
        gpus,
        gpu,
        memory,
        tuple(results),
        seconds=max(each.seconds for each in results) + _idle_seconds(short, stage, topology, results),
        steps=_steps(recipe, stage),
        tokens=tokens,
        model_flops=tokens * _flops_per_token(short, stage) if stage in TRAINS else None,
    )


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a data sheet. Raises RecipeError for an unknown name."""
    if name not in GPUS:
        raise RecipeError(f"the GPU {name!r} is not known. Use one of {', '.join(GPUS)}.{did_you_mean(name, GPUS)}")
    return GPUS[name]


def _idle_seconds(recipe: Recipe, stage: str, topology: PlannedTopology, results: Sequence[RankResult]) -> float:
    """Return the seconds that a rank waits for other pipeline stages: they take turns in a refit and at each generated
    token, and are independent in a cut and an export; elsewhere the pipeline fills and drains."""
    others = topology.pp - 1
    if stage == "export":
        return 0.0
    if stage == "generate":
        return others * max(each.seconds for each in results)
    if stage == "prune":
        return others * max(each.seconds for each in results) if recipe.prune.refit != "none" else 0.0
    return others / topology.vp * max(each.micro_batch_seconds for each in results)


def _on_rank(
    recipe: Recipe, stage: str, kind: RankKind, topology: PlannedTopology, gpu: str, ledger: Ledger
) -> Rehearsed:
    """Rehearse a stage as one rank; a fault names the kind of rank."""
    with TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rehearsed_rank(kind.rank, topology.world, gpu=gpu, ledger=ledger):
            ranks = Topology.start(recipe.parallel)
            try:
                return run_stage(recipe, stage, ranks, ledger, Path(out))
            except DeviceFault as fault:
                raise DeviceFault(f"{kind.name} (rank {kind.rank}): {fault}") from fault
            finally:
                ranks.stop()
                gc.collect()


def _result(kind: RankKind, piece: Rehearsed) -> RankResult:
    """Return a rank's work with all micro-batches, from that of the rehearsed ones."""
    last, count = piece.steps[-1], piece.counts[-1]
    missing = piece.micro_batches - count
    if len(piece.counts) > 1 and count > piece.counts[-2]:
        unit = count - piece.counts[-2]
        whole = last.grown(piece.steps[-2], missing / unit)
    else:
        unit, whole = count, last.grown(Section(), missing / count) if missing else last
        whole.peak, whole.peak_by_kind = last.peak, Sums(last.peak_by_kind)
    seconds = sum(whole.by_resource.values()) / max(piece.micro_batches, 1)
    if piece.repeats > 1:
        peak, kinds = whole.peak, whole.peak_by_kind
        whole = whole.grown(Section(), piece.repeats - 1)
        whole.peak, whole.peak_by_kind = peak, kinds
    return RankResult(kind, whole, piece.start, piece.validation, seconds)


def _steps(recipe: Recipe, stage: str) -> int:
    keys = {"correct": recipe.correct, "distill": recipe.distill}.get(stage)
    return sum(phase.steps for phase in resolved(keys, recipe.data)) if keys else 1


def _flops_per_token(recipe: Recipe, stage: str) -> float:
    """Return the models' FLOPs per token of training, as `estimate` counts them: without recomputation."""
    expected = count(recipe, gpus=1)
    tokens = {"correct": expected.correct_tokens, "distill": expected.distill_tokens}[stage]
    return expected.stage_flops[stage] / tokens
