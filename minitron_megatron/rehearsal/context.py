"""Context of a stage on a rehearsed rank: its models have no weights, its text is random, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..convert import read_config
from ..data import Batch
from ..evaluate import ValidationSet
from ..forecast import student_shape
from ..model import Chunk, ModelConfig, assign, build, named_shards
from ..parallel import AttentionContext
from ..recipe import ResolvedPhase
from ..run import Context
from .ledger import Ledger, Section

__all__ = ["Rehearsed", "RehearsedContext"]

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
    repeats: int = 1
    """Times that all micro-batches are passed: once for each candidate of a search."""


class _Announced(dict[str, Sequence[Batch]]):
    """Held-out text whose use starts a section."""

    def __init__(self, batches: Mapping[str, Sequence[Batch]], used: Callable[[], None]) -> None:
        super().__init__(batches)
        self._used = used

    def items(self):  # type: ignore[no-untyped-def, override]
        self._used()
        return super().items()


@dataclass(frozen=True)
class RehearsedContext(Context):
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
            drawn = self.drawn(self.rehearsed.counts[step], phase.keys.micro_batch)
            return [batch.shared(self.topology) for batch in drawn]

        return batches

    def calibration_batches(self, samples: int | None = None) -> list[Batch]:
        keys = self.recipe.score
        if self.rehearsed.steps:  # of a refit
            return self.drawn(self.rehearsed.counts[len(self.rehearsed.steps) - 1], keys.micro_batch)
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
            return _Announced({"text": self.drawn(self.topology.pp, keys.micro_batch)}, self._validates)
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
        return self.drawn(count, micro_batch)

    def _micro_batches(self, samples: int, micro_batch: int) -> int:
        """Return how many micro-batches a rank's share of the samples is."""
        return max(1, -(-samples // (micro_batch * self.topology.dp)))

    def drawn(self, count: int, micro_batch: int) -> list[Batch]:
        """Return micro-batches of random tokens, each sample one document, on this rank's device."""
        vocab, sequence = read_config(self.recipe.model).shape.vocab, self.recipe.data.sequence
        mask = torch.ones(micro_batch, sequence, dtype=torch.bool)
        apart = not self.recipe.data.cross_documents
        context = AttentionContext(torch.zeros(micro_batch, sequence, dtype=torch.long)) if apart else None
        drawn = torch.randint(0, vocab, (count, micro_batch, sequence + 1))
        return self._on_device([Batch(each[:, :-1], each[:, 1:], mask, context) for each in drawn])
