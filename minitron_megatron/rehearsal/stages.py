"""Stages of a run on a rehearsed rank: the run's own code, with models that have no weights and text that is random."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..convert import read_config
from ..data import Batch
from ..errors import RecipeError
from ..evaluate import ValidationSet
from ..events import silent
from ..forecast import student_shape
from ..model import Chunk, ModelConfig, assign, build, named_shards
from ..parallel import AttentionContext, Topology
from ..recipe import Recipe, ResolvedPhase, resolved
from ..run import STAGES, Context
from .ledger import Ledger, Section

__all__ = ["COVERED", "Rehearsed", "rehearsable", "run_stage"]

COVERED = ("correct", "distill", "score", "prune", "evaluate")
"""Stages that can be rehearsed. Of `evaluate` only the losses on held-out text, of `score` not the layers' importance
by tasks, of `prune` the cut and the refit: units by chance, in one round, no merged heads. Nothing is written."""
TRAINS = ("correct", "distill")
SAVES_NEVER = 10**9
FEW = 3
"""Micro-batches of a rank with which a refit is rehearsed, where it has more: one is held out."""


@dataclass
class Rehearsed:
    """Sections of a stage on one rank, by name, and its micro-batches."""

    micro_batches: int = 0
    """Micro-batches of a step, or of the whole stage where it does not train."""
    tokens: int = 0
    """Tokens of a micro-batch of this rank's replica."""
    counts: list[int] = field(default_factory=list)
    """Micro-batches of each rehearsed step."""
    steps: list[Section] = field(default_factory=list)
    start: Section = field(default_factory=Section)
    """Loading the models, and whatever comes before the first batch."""
    validation: Section | None = None


def rehearsable(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe of a short run of one stage, in one phase: the one with the most tokens in a micro-batch.

    Raises RecipeError for a stage that is not covered or that the recipe does not have.
    """
    if stage not in COVERED:
        raise RecipeError(
            f"the stage {stage!r} cannot be rehearsed. Give --stage {', '.join(COVERED[:-1])} or evaluate."
        )
    if not STAGES[stage].wanted(recipe):
        raise RecipeError(f"this recipe does not use the stage {stage}. Give another --stage.")
    if stage == "prune":
        return _without_scores(recipe)
    if stage not in TRAINS:
        return recipe.replaced(evaluate=recipe.evaluate.replaced(suite=None, tasks=()))
    keys = recipe.correct if stage == "correct" else recipe.distill
    assert keys is not None
    phase = max(resolved(keys, recipe.data), key=lambda each: each.keys.micro_batch * each.sequence)
    never = {"save_every": SAVES_NEVER, "validate_every": SAVES_NEVER}
    short = phase.keys.replaced(**never, **({"phases": (), "retain": False} if stage == "distill" else {}))
    return recipe.replaced(**{stage: short}, data=recipe.data.replaced(sequence=phase.sequence))


def _without_scores(recipe: Recipe) -> Recipe:
    """Return a recipe whose cut has the same sizes and needs no scores."""
    keys = recipe.prune
    layers = tuple(range(keys.layers)) if isinstance(keys.layers, int) else keys.layers
    blind = keys.replaced(by="random", teacher="original", layers=layers, iterations=1, merge="none")
    return recipe.replaced(prune=blind)


def run_stage(recipe: Recipe, stage: str, topology: Topology, ledger: Ledger, out: Path) -> Rehearsed:
    """Run a stage of a `rehearsable` recipe on this rank; `out`: an empty folder for what it writes."""
    rehearsed = Rehearsed()
    if stage in TRAINS:
        keys = recipe.correct if stage == "correct" else recipe.distill
        assert keys is not None
        window = recipe.distill.teacher_window if stage == "distill" else None
        every = keys.global_batch // (keys.micro_batch * topology.replicas)
        rehearsed.micro_batches, rehearsed.tokens = every, keys.micro_batch * recipe.data.sequence
        rehearsed.counts = _counts(every, topology, window or 1)
        steps = len(rehearsed.counts)
        short = keys.replaced(tokens=steps * keys.global_batch * recipe.data.sequence)
        recipe = recipe.replaced(**{stage: short})
    rehearsed.start = ledger.begin()
    done: dict[str, dict[str, Any]] = {"prepare": {"model_hash": "", "sources": {}}, "correct": {"hash": ""}}
    at_out = recipe.replaced(out=out)
    context = _Context(at_out, topology, silent, done, lambda _: "rehearsal" * 2, ledger=ledger, rehearsed=rehearsed)
    if stage == "prune":
        _prune(context)
    else:
        STAGES[stage].does(context)
    return rehearsed


def _prune(context: _Context) -> None:
    """Cut and refit, with two numbers of micro-batches where there are many."""
    ledger, rehearsed = context.ledger, context.rehearsed
    ledger.wants_float64 = True
    rehearsed.micro_batches, rehearsed.counts = context.refit_micro_batches()
    started = ledger.now
    for _ in rehearsed.counts:
        gc.collect()
        for before in rehearsed.steps:  # what it left, such as mcore's caches, is no growth with the samples
            before.peak += ledger.now - started
        started = ledger.now
        rehearsed.steps.append(ledger.begin())
        STAGES["prune"].does(context)
    for before in rehearsed.steps[:-1]:
        before.peak_by_kind = rehearsed.steps[-1].peak_by_kind


def _counts(every: int, topology: Topology, window: int) -> list[int]:
    """Return the micro-batches of the rehearsed steps: a short one first, in which the optimizer's state is made, then
    one that fills the pipeline, and one with a unit more; or two whole steps where that is less."""
    unit = window if topology.vp == 1 else -(-window // topology.pp) * topology.pp
    full = -(-max(topology.pp, 1) // unit) * unit
    return [every] * 2 if every <= full + unit else [unit, full, full + unit]


class _Announced(dict[str, Sequence[Batch]]):
    """Held-out text whose use starts a section."""

    def __init__(self, batches: Mapping[str, Sequence[Batch]], used: Callable[[], None]) -> None:
        super().__init__(batches)
        self._used = used

    def items(self):  # type: ignore[no-untyped-def, override]
        self._used()
        return super().items()


@dataclass(frozen=True)
class _Context(Context):
    """Context whose models are empty and whose text is random."""

    ledger: Ledger = field(kw_only=True)
    rehearsed: Rehearsed = field(kw_only=True)

    def load(self, folder: Path, dtype: torch.dtype | None = None, *, trains: bool = False) -> list[Chunk]:
        config, recompute = self._config(folder), self.recipe.recompute if trains else "none"
        model = build(config, self.topology, dtype or self.dtype, recompute=recompute, spec=self.recipe.spec)
        with self.ledger.naming("weights"):
            for shard in named_shards(model):
                assign(shard, torch.empty_like(shard.tensor, device=self.topology.device))
        return model

    def load_teacher(self, *, trains: bool = False) -> list[Chunk]:
        with self.ledger.naming("teacher"):
            return super().load_teacher(trains=trains)

    def _verified(self, folder: Path, dtype: torch.dtype, *, trains: bool = False) -> list[Chunk]:
        return self.load(folder, dtype, trains=trains)

    def _config(self, folder: Path) -> ModelConfig:
        """Return the configuration of a model, whether or not the run has written it."""
        own = self.folders
        if folder in (own.model("corrected"), self.recipe.model):
            return read_config(self.recipe.model)
        if folder == self.recipe.student or (folder == self.recipe.distill.start and folder.is_dir()):
            return read_config(folder)
        config = read_config(self.recipe.model)
        return replace(config, shape=student_shape(self.recipe, config.shape))

    def save(self, *_: object, **__: object) -> str:
        return ""

    def sealed(self, folder: Path) -> str:
        return ""

    def training_batches(self, phase: ResolvedPhase, seed: int) -> Callable[[int], list[Batch]]:
        def batches(step: int) -> list[Batch]:
            self.rehearsed.steps.append(self.ledger.begin())
            drawn = self._drawn(self.rehearsed.counts[step], phase.keys.micro_batch)
            return [batch.shared(self.topology) for batch in drawn]

        return batches

    def calibration_batches(self, samples: int | None = None) -> list[Batch]:
        keys = self.recipe.score
        if self.rehearsed.steps:  # of a refit
            return self._drawn(self.rehearsed.counts[len(self.rehearsed.steps) - 1], keys.micro_batch)
        return self._counted(samples or keys.samples, keys.micro_batch)

    def refit_micro_batches(self) -> tuple[int, list[int]]:
        """Return (micro-batches of this rank in a refit, those of each rehearsal of it). There are two rehearsals where
        it has many: from their difference the rest follows, since its equations take the same time for any number."""
        keys, samples = self.recipe.score, self.recipe.prune.refit_samples
        if self.recipe.prune.refit == "none":
            return 1, [1]
        every = self._micro_batches(samples or keys.samples, keys.micro_batch)
        return every, [every] if every <= FEW else [FEW - 1, FEW]

    def held_out(self) -> ValidationSet:
        keys = self.recipe.evaluate
        if self.rehearsed.counts:  # of a training: the held-out text is used after its last step
            return _Announced({"text": self._drawn(self.topology.pp, keys.micro_batch)}, self._validates)
        return {"text": self._counted(keys.samples, keys.micro_batch)}

    def _validates(self) -> None:
        if self.rehearsed.validation is None:
            self.rehearsed.validation = self.ledger.begin()

    def _counted(self, samples: int, micro_batch: int) -> list[Batch]:
        """Return the first micro-batches of so many samples, and start the section of a stage that does not train."""
        every = self._micro_batches(samples, micro_batch)
        count = min(every, self.topology.pp)
        self.rehearsed.micro_batches, self.rehearsed.tokens = every, micro_batch * self.recipe.data.sequence
        self.rehearsed.counts = [count]
        self.rehearsed.steps.append(self.ledger.begin())
        return self._drawn(count, micro_batch)

    def _micro_batches(self, samples: int, micro_batch: int) -> int:
        """Return how many micro-batches a rank's share of the samples is."""
        return max(1, -(-samples // (micro_batch * self.topology.dp)))

    def _drawn(self, count: int, micro_batch: int) -> list[Batch]:
        """Return micro-batches of random tokens, each sample one document, on this rank's device."""
        vocab, sequence = read_config(self.recipe.model).shape.vocab, self.recipe.data.sequence
        mask = torch.ones(micro_batch, sequence, dtype=torch.bool)
        apart = not self.recipe.data.cross_documents
        context = AttentionContext(torch.zeros(micro_batch, sequence, dtype=torch.long)) if apart else None
        drawn = torch.randint(0, vocab, (count, micro_batch, sequence + 1))
        return self._on_device([Batch(each[:, :-1], each[:, 1:], mask, context) for each in drawn])
