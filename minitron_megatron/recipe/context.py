"""What a stage is given, and the models and data that several stages need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..convert import Architecture, folder_hash, load_hf, model_hash, read_config, save_hf
from ..data import Batch, Corpus, calibration, calibration_batches, check_content, held_out_batches, step_batches
from ..errors import CheckpointError, FileError
from ..evaluate import ValidationSet
from ..events import Listener
from ..files import MANIFEST, checksum, verify_checksums, write_checksums
from ..model import check_finite
from ..parallel import Topology, broadcast_object, fail_together, place_in_world
from .phases import ResolvedPhase
from .schema import Recipe

__all__ = ["Context", "Folders"]

WRITES = {
    "corrected": "correct",
    "trimmed": "prune",
    "pruned": "prune",
    "distilled": "distill",
    "random": "baseline",
    "export": "export",
}
"""Folder of a model in a run -> the stage that writes it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Folders:
    """Where things lie in a run folder."""

    run: Path

    @property
    def data(self) -> Path:
        return self.run / "data"

    @property
    def corrected(self) -> Path:
        return self.run / "corrected"

    @property
    def scores(self) -> Path:
        return self.run / "scores" / "scores.safetensors"

    @property
    def depth(self) -> Path:
        return self.run / "scores" / "depth.json"

    @property
    def plan(self) -> Path:
        return self.run / "pruned" / "plan.json"

    @property
    def refit(self) -> Path:
        """Errors of each layer before and after the refit."""
        return self.run / "pruned" / "refit.json"

    @property
    def search(self) -> Path:
        """The table of candidates, and what is known of each while the search is at work."""
        return self.run / "search"

    @property
    def summary(self) -> Path:
        return self.run / "summary.json"

    @property
    def evaluation(self) -> Path:
        """What the tasks' harness found, a file a model."""
        return self.run / "evaluation"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    def model(self, name: str) -> Path:
        """The Hugging Face folder of a model of the run: `corrected`, `pruned`, `distilled`, `random`, `export`; and
        `trimmed`, the cut model before its refit, where there is one."""
        return self.run / name

    @property
    def checkpoints(self) -> Path:
        """What unfinished training left to resume from."""
        return self.run / "checkpoints"

    def record(self, stage: str) -> Path:
        """What a finished stage left: its fingerprint, results and seconds."""
        return self.run / "stages" / f"{stage}.json"


@dataclass(frozen=True)
class Context:
    """A stage's view of the run. `done` holds the results of the stages before it."""

    recipe: Recipe
    topology: Topology
    listener: Listener
    done: Mapping[str, Mapping[str, Any]]
    mark_of: Callable[[Recipe], str]
    """The fingerprint of the stage at work, were this the recipe."""
    place: str = ""
    """Of several models that a stage trains, the one at work."""

    @cached_property
    def folders(self) -> Folders:
        return Folders(self.recipe.out)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in training."""
        return DTYPES[self.recipe.dtype]

    @property
    def teacher(self) -> Path:
        """The folder of the model that teaches: corrected, where the recipe corrects it beforehand."""
        return self.folders.corrected if self.recipe.corrects_first else self.recipe.model

    @property
    def uncut(self) -> Path:
        """The folder of the model that is scored and pruned: the teacher, or what it was before its correction."""
        return self.recipe.model if self.recipe.prune.teacher == "original" else self.teacher

    @property
    def uncut_hash(self) -> str:
        """Who the model to prune must be."""
        return self._expected(self.uncut)

    def _expected(self, folder: Path) -> str:
        """The hash that the run recorded of the original or the corrected model."""
        corrected = folder == self.folders.corrected
        return str(self.done["correct"]["hash"] if corrected else self.done["prepare"]["model_hash"])

    def load(self, folder: Path, dtype: torch.dtype | None = None, *, trains: bool = False) -> list[Any]:
        """A model of the run, in the training dtype unless said otherwise. Collective over the world.

        Raises CheckpointError where its files are not those that the run wrote, or a weight is not finite.
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
        check_finite(model, str(folder), "Give a model that is whole.")
        return model

    def expect_unchanged(self, folder: Path) -> None:
        """Raises CheckpointError where a model folder of this run holds other files than the stage that wrote it left.

        Any other folder passes. Each rank reads its share of the files. Collective over the world.
        """
        stage = WRITES.get(folder.name) if folder.parent == self.recipe.out else None
        key = "trimmed_files" if folder.name == "trimmed" else "files"
        recorded, manifest = self.done.get(stage or "", {}).get(key), folder / MANIFEST
        with fail_together():
            if stage is None or not (recorded or manifest.is_file()):
                return
            try:
                if recorded and checksum(manifest) != recorded:
                    raise FileError(f"{manifest} is not the one that the stage {stage} wrote.")
                verify_checksums(manifest, share=place_in_world())
            except FileError as error:
                raise CheckpointError(f"{error} Remove {folder}, and run `minitron {stage}` again.") from error

    def load_teacher(self, *, trains: bool = False) -> list[Any]:
        """The model that teaches, verified. Raises CheckpointError where it is not what the run recorded."""
        return self._verified(self.teacher, DTYPES[self.recipe.teacher_runs_in], trains=trains)

    def load_uncut(self, dtype: torch.dtype | None = None) -> list[Any]:
        """The model to prune, verified as `load_teacher` does."""
        return self._verified(self.uncut, dtype or self.dtype)

    def _verified(self, folder: Path, dtype: torch.dtype, *, trains: bool = False) -> list[Any]:
        model = self.load(folder, dtype, trains=trains)
        if self._hash(model, folder, dtype) != self._expected(folder):
            raise CheckpointError(f"the weights in {folder} changed since the run began. Give another --out.")
        return model

    def _hash(self, model: list[Any], folder: Path, dtype: torch.dtype) -> str:
        """Of the loaded weights, or of the file where loading rounded them. Collective over the world."""
        stored = read_config(folder).source
        exact = dtype == torch.float32 or DTYPES.get(stored.get("torch_dtype") or stored.get("dtype", "")) == dtype
        return model_hash(model, self.topology) if exact else folder_hash(folder)

    def save(
        self, model: Any, folder: Path, dtype: torch.dtype | None = None, architecture: Architecture = "own"
    ) -> str:
        """Writes a model with the teacher's tokenizer and returns its hash. Collective over the world.

        Raises CheckpointError, and writes nothing, where a weight is not finite.
        """
        check_finite(model, f"the model for {folder}", "It is not written.")
        save_hf(
            model,
            folder,
            self.topology,
            dtype=dtype,
            files_from=self.recipe.model,
            architecture=architecture,
            listener=self.listener,
        )
        return model_hash(model, self.topology)

    def sealed(self, folder: Path) -> str:
        """Lists the checksums of a folder's files in it, and returns that of the list, for `expect_unchanged`.

        Collective over the world.
        """
        digest, manifest = "", folder / MANIFEST
        with fail_together():
            if self.topology.rank == 0:
                files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != manifest)
                write_checksums(manifest, files)
                digest = checksum(manifest)
        return str(broadcast_object(digest))

    def checkpoints(self, recipe: Recipe) -> Path:
        """Where the stage at work would keep its checkpoints: another recipe's are elsewhere."""
        return self.folders.checkpoints / self.mark_of(recipe)[:16] / self.place

    @property
    def blend(self) -> list[tuple[Path, float]]:
        """(prefix of the prepared corpus, weight) of each source."""
        return self._weighted([source.weight for source in self.recipe.data.sources])

    @property
    def _end(self) -> int | None:
        """The token that ends a document, where they are apart."""
        first = next(iter(self.done["prepare"]["sources"].values()))
        return None if self.recipe.data.cross_documents else int(first["end"])

    def _weighted(self, weights: Sequence[float]) -> list[tuple[Path, float]]:
        """(prefix, weight) of each source. Raises DataError where a corpus is not the one that the run prepared."""
        sources = self.done["prepare"]["sources"]
        for name, told in sources.items():
            check_content(self.folders.data / name, told["content"])
        return [(self.folders.data / name, weight) for name, weight in zip(sources, weights, strict=True)]

    def training_batches(self, phase: ResolvedPhase, seed: int) -> Callable[[int], list[Batch]]:
        """step -> this rank's micro-batches of the blend. Collective over the world."""
        keys = phase.keys
        corpus = Corpus(
            self._weighted(phase.weights),
            sequence=phase.sequence,
            samples=phase.steps * keys.global_batch,
            seed=seed,
            cache=self.folders.data / "index",
            end=self._end,
            repeat=self.recipe.data.repeat,
        )

        def batches(step: int) -> list[Batch]:
            share = self._share(keys.micro_batch) | {"dp_rank": self.topology.replica, "dp": self.topology.replicas}
            mine = self._placed(step_batches(corpus, step, global_batch=keys.global_batch, **share))
            return [batch.shared(self.topology) for batch in mine]

        return batches

    def calibration_batches(self, samples: int | None = None) -> list[Batch]:
        """This rank's share of the calibration samples. Collective over the world."""
        corpus = self.calibration(samples)
        return self._placed(calibration_batches(corpus, **self._share(self.recipe.score.micro_batch)))

    def calibration(self, samples: int | None = None) -> Corpus:
        """The calibration samples, by default as many as scoring takes. Collective over the world."""
        keys = self.recipe.score
        return calibration(
            self.blend,
            samples=samples or keys.samples,
            sequence=self.recipe.data.sequence,
            seed=self.recipe.seed,
            cache=self.folders.data / "index",
            end=self._end,
        )

    def held_out(self) -> ValidationSet:
        """This rank's share of the held-out samples of each source, as many as there are up to what the recipe asks.

        Collective over the world.
        """
        keys, sequence = self.recipe.evaluate, self.recipe.data.sequence
        rounds = self.topology.pp if self.topology.vp > 1 else 1  # what mcore's interleaving takes at a time
        out = {}
        for prefix, _ in self.blend:
            held = (self.done["prepare"]["sources"][prefix.name]["validation_tokens"] - 1) // sequence
            corpus = Corpus(
                [(prefix, 1.0)],
                "valid",
                sequence=sequence,
                samples=max(1, min(keys.samples, held)),
                seed=self.recipe.seed,
                cache=self.folders.data / "index",
                end=self._end,
            )
            out[prefix.name] = self._placed(held_out_batches(corpus, rounds=rounds, **self._share(keys.micro_batch)))
        return out

    def _share(self, micro_batch: int) -> dict[str, int]:
        """Which part of the samples is this rank's."""
        return {"micro_batch": micro_batch, "dp_rank": self.topology.dp_rank, "dp": self.topology.dp}

    def _placed(self, batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.topology.device) for batch in batches]
