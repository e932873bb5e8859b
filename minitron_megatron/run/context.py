"""Context of a stage: recipe, topology, earlier results, and access to the run's models and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..convert import Architecture, folder_hash, load_hf, model_hash, read_config, save_hf, stop_at
from ..data import (
    Batch,
    Corpus,
    calibration,
    calibration_batches,
    chat_codec,
    check_content,
    held_out_batches,
    step_batches,
)
from ..errors import CheckpointError, FileError
from ..evaluate import ValidationSet
from ..events import Listener
from ..files import MANIFEST, checksum, verify_checksums, write_checksums
from ..model import Chunk, check_finite
from ..parallel import Topology, broadcast_object, fail_together, place_in_world
from ..recipe import Recipe, ResolvedPhase, prefixes
from ..run_folder import RunFolder

__all__ = ["DTYPES", "Context", "Result"]

WRITES = {
    "corrected": "correct",
    "trimmed": "prune",
    "pruned": "prune",
    "distilled": "distill",
    "random": "baseline",
    "export": "export",
}
"""Folder of a model in a run -> the stage that writes it."""

Result = dict[str, Any]
"""Result of a stage, as JSON. Stages that use it run again when it changes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _writer(folder: str) -> str | None:
    """Return the stage that writes a model folder of a run, by its name; None for other folders."""
    return WRITES.get(folder) or (folder.replace("aligned", "align") if folder.startswith("aligned-") else None)


@dataclass(frozen=True)
class Context:
    """A stage's view of the run."""

    recipe: Recipe
    topology: Topology
    listener: Listener
    done: Mapping[str, Result]
    """Stage -> result, of the stages before this one."""
    mark_of: Callable[[Recipe], str] = lambda recipe: ""
    """Recipe -> fingerprint of the running stage with that recipe; outside of a stage it is empty."""
    place: str = ""
    """Name of the model being trained, in a stage that trains several."""
    corpora: Path | None = None
    """Folder of the tokenized training text. None: the run's."""

    @cached_property
    def folders(self) -> RunFolder:
        return RunFolder(self.recipe.out)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights in training."""
        return DTYPES[self.recipe.dtype]

    @property
    def teacher(self) -> Path:
        """Folder of the teacher: the corrected model if the recipe corrects it beforehand."""
        return self.folders.model("corrected") if self.recipe.corrects_first else self.recipe.model

    @property
    def prune_source(self) -> Path:
        """Folder of the model that is scored and pruned: the teacher, or the original before correction."""
        return self.recipe.model if self.recipe.prune.teacher == "original" else self.teacher

    @property
    def untrained_student(self) -> Path:
        """Folder of the student before distillation: the pruned model, or the recipe's own `student`."""
        return self.recipe.student or self.folders.model("pruned")

    @property
    def student(self) -> Path:
        """Folder of the run's student: distilled, and aligned if the recipe aligns it."""
        return self.aligned(len(self.recipe.align))

    def aligned(self, rounds: int) -> Path:
        """Return the folder of the student after so many rounds of alignment."""
        return self.folders.model(f"aligned-{rounds}" if rounds else "distilled")

    @property
    def student_files(self) -> Path:
        """Folder of the tokenizer and generation settings that are copied beside the student."""
        return self.recipe.student or self.recipe.model

    @property
    def prune_source_hash(self) -> str:
        """Recorded hash of the model to prune."""
        return self._expected(self.prune_source)

    def _expected(self, folder: Path) -> str:
        """Return the recorded hash of the original or the corrected model."""
        corrected = folder == self.folders.model("corrected")
        return str(self.done["correct"]["hash"] if corrected else self.done["prepare"]["model_hash"])

    def load(self, folder: Path, dtype: torch.dtype | None = None, *, trains: bool = False) -> list[Chunk]:
        """Load a model of the run, by default in the training dtype. Collective over the world.

        Raises CheckpointError if its files differ from those that the run wrote, or a weight is not finite.
        """
        self.expect_unchanged(folder)
        model = load_hf(
            folder,
            self.topology,
            dtype or self.dtype,
            recompute=self.recipe.recompute if trains else "none",
            spec=self.recipe.spec,
            listener=self.listener,
        )
        check_finite(model, str(folder), "Give an intact model.")
        return model

    def expect_unchanged(self, folder: Path) -> None:
        """Raise CheckpointError if a model folder of this run was changed since its stage wrote it.

        Any other folder passes. Each rank reads its share of the files. Collective over the world.
        """
        stage = _writer(folder.name) if folder.parent == self.recipe.out else None
        key = "trimmed_files" if folder.name == "trimmed" else "files"
        recorded, manifest = self.done.get(stage or "", {}).get(key), folder / MANIFEST
        with fail_together():
            if stage is None or not (recorded or manifest.is_file()):
                return
            try:
                if recorded and checksum(manifest) != recorded:
                    raise FileError(f"{manifest} was changed since the stage {stage} wrote it.")
                verify_checksums(manifest, share=place_in_world())
            except FileError as error:
                raise CheckpointError(f"{error} Remove {folder}, and run `minitron {stage}` again.") from error

    def load_teacher(self, *, trains: bool = False) -> list[Chunk]:
        """Load the teacher. Raises CheckpointError if it is not the model that the run recorded."""
        return self._verified(self.teacher, DTYPES[self.recipe.frozen_teacher_dtype], trains=trains)

    def load_prune_source(self, dtype: torch.dtype | None = None) -> list[Chunk]:
        """Load the model to prune, verified as in `load_teacher`."""
        return self._verified(self.prune_source, dtype or self.dtype)

    def _verified(self, folder: Path, dtype: torch.dtype, *, trains: bool = False) -> list[Chunk]:
        model = self.load(folder, dtype, trains=trains)
        if self._hash(model, folder, dtype) != self._expected(folder):
            raise CheckpointError(f"the weights in {folder} changed since the run began. Start a new run with --out.")
        return model

    def _hash(self, model: list[Chunk], folder: Path, dtype: torch.dtype) -> str:
        """Return the hash of the loaded weights, or of the files if loading rounded them. Collective over the world."""
        stored = read_config(folder).source
        exact = dtype == torch.float32 or DTYPES.get(stored.get("torch_dtype") or stored.get("dtype", "")) == dtype
        return model_hash(model, self.topology) if exact else folder_hash(folder)

    def save(
        self, model: list[Chunk], folder: Path, dtype: torch.dtype | None = None, architecture: Architecture = "own"
    ) -> str:
        """Write a model with its tokenizer and return its hash. Collective over the world.

        Raises CheckpointError, and writes nothing, if a weight is not finite.
        """
        check_finite(model, f"the model for {folder}", "It is not written.")
        save_hf(
            model,
            folder,
            self.topology,
            dtype=dtype,
            files_from=self.recipe.model if folder == self.folders.model("corrected") else self.student_files,
            architecture=architecture,
            listener=self.listener,
        )
        if folder.name.startswith(("aligned-", "export")):
            self.stop_at_turns(folder)
        return model_hash(model, self.topology)

    def stop_at_turns(self, folder: Path) -> None:
        """Let generation end where an aligned model ends its turn, in the generation settings of its folder."""
        with fail_together():
            if self.recipe.align and self.topology.rank == 0:
                stop_at(folder, chat_codec(folder).ends())

    def sealed(self, folder: Path) -> str:
        """Write the checksums of a folder's files into it, and return the checksum of that list.

        `expect_unchanged` compares with it later. Collective over the world.
        """
        digest, manifest = "", folder / MANIFEST
        with fail_together():
            if self.topology.rank == 0:
                files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != manifest)
                write_checksums(manifest, files)
                digest = checksum(manifest)
        return str(broadcast_object(digest))

    def save_sealed(
        self, model: list[Chunk], folder: Path, dtype: torch.dtype | None = None, architecture: Architecture = "own"
    ) -> dict[str, str]:
        """Write a model and its files' checksums; return its hash and the checksum of that list. Collective."""
        return {"hash": self.save(model, folder, dtype, architecture), "files": self.sealed(folder)}

    @cached_property
    def phase_checkpoints(self) -> list[tuple[Path, str]]:
        """Folder of the running stage's checkpoints, and its fingerprint, with the recipe cut off after each phase."""
        marks = [self.mark_of(recipe) for recipe in prefixes(self.recipe)]
        return [(self.folders.checkpoints / mark[:16] / self.place, mark) for mark in marks]

    @property
    def blend(self) -> list[tuple[Path, float]]:
        """Prefix of the prepared corpus and weight of each source."""
        return self._weighted([source.weight for source in self.recipe.data.sources])

    @property
    def _index(self) -> Path:
        """Folder of the sample indices of the training text."""
        return self.corpora / "index" if self.corpora else self.folders.index

    @property
    def _end(self) -> int | None:
        """The end-of-document token if attention stays within documents; otherwise None."""
        return None if self.recipe.data.cross_documents else self._end_token

    @property
    def _end_token(self) -> int:
        first = next(iter(self.done["prepare"]["sources"].values()))
        return int(first["end"])

    def _weighted(self, weights: Sequence[float]) -> list[tuple[Path, float]]:
        return self._corpora(self.corpora or self.folders.data, self.done["prepare"]["sources"], weights)

    @property
    def _calibration_blend(self) -> list[tuple[Path, float]]:
        """Prefix and weight of each source of the calibration samples."""
        own = [source.weight for source in self.recipe.score.sources]
        return self._corpora(self.folders.calibration, self.done["calibrate"]["sources"], own) if own else self.blend

    def _corpora(
        self, folder: Path, sources: Mapping[str, Mapping[str, Any]], weights: Sequence[float]
    ) -> list[tuple[Path, float]]:
        """Return (prefix, weight) of each source. Raises DataError if a corpus changed since the run tokenized it."""
        for name, recorded in sources.items():
            check_content(folder / name, recorded["content"])
        return [(folder / name, weight) for name, weight in zip(sources, weights, strict=True)]

    def training_batches(self, phase: ResolvedPhase, seed: int) -> Callable[[int], list[Batch]]:
        """Return a function: step -> this rank's micro-batches of the blend. Collective over the world."""
        keys = phase.keys
        corpus = Corpus(
            self._weighted(phase.weights),
            sequence=phase.sequence,
            samples=phase.samples,
            seed=seed,
            cache=self._index,
            end=self._end,
            repeat=self.recipe.data.repeat,
        )

        def batches(step: int) -> list[Batch]:
            share = self._share(keys.micro_batch) | {"dp_rank": self.topology.replica, "dp": self.topology.replicas}
            local = self._on_device(step_batches(corpus, step, global_batch=keys.global_batch, **share))
            return [batch.shared(self.topology) for batch in local]

        return batches

    def calibration_batches(self, samples: int | None = None) -> list[Batch]:
        """Return this rank's share of the calibration samples. Collective over the world."""
        corpus = self.calibration(samples)
        return self._on_device(calibration_batches(corpus, **self._share(self.recipe.score.micro_batch)))

    def calibration(self, samples: int | None = None) -> Corpus:
        """Return all calibration samples, by default as many as scoring takes. Collective over the world."""
        keys = self.recipe.score
        chats = any(source.chat for source in keys.sources)
        return calibration(
            self._calibration_blend,
            samples=samples or keys.samples,
            sequence=self.recipe.data.sequence,
            seed=self.recipe.seed,
            cache=self.folders.index,
            end=self._end_token if chats else self._end,
        )

    def held_out(self) -> ValidationSet:
        """Return this rank's share of each source's held-out samples, at most `evaluate.samples` per source.

        Collective over the world.
        """
        keys, sequence = self.recipe.evaluate, self.recipe.data.sequence
        rounds = self.topology.pp if self.topology.vp > 1 else 1  # the interleaved schedule needs a multiple of pp
        out = {}
        for prefix, _ in self.blend:
            held = (self.done["prepare"]["sources"][prefix.name]["validation_tokens"] - 1) // sequence
            corpus = Corpus(
                [(prefix, 1.0)],
                "valid",
                sequence=sequence,
                samples=max(1, min(keys.samples, held)),
                seed=self.recipe.seed,
                cache=self._index,
                end=self._end,
            )
            out[prefix.name] = self._on_device(held_out_batches(corpus, rounds=rounds, **self._share(keys.micro_batch)))
        return out

    def _share(self, micro_batch: int) -> dict[str, int]:
        """Return the arguments that select this rank's part of the samples."""
        return {"micro_batch": micro_batch, "dp_rank": self.topology.dp_rank, "dp": self.topology.dp}

    def _on_device(self, batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.topology.device) for batch in batches]
