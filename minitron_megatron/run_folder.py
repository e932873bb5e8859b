"""Paths of all files of a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, whether or not they exist."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Return the folder of a run that was started. Raises CheckpointError for any other folder."""
        folder = cls(path)
        if not folder.recipe.is_file():
            raise CheckpointError(
                f"{path} is not a run folder: it has no {folder.recipe.name}. Give the folder of a run."
            )
        return folder

    @property
    def recipe(self) -> Path:
        """Recipe of the last start, with every default written out."""
        return self.path / "recipe.yaml"

    @property
    def models(self) -> Path:
        """Models that were brought in from elsewhere: their places, commits and folders."""
        return self.path / "models.json"

    @property
    def versions(self) -> Path:
        """Versions of the installed packages, this project's commit, the machine and the number of processes."""
        return self.path / "versions.json"

    @property
    def predicted(self) -> Path:
        """Predicted parameters, bytes and FLOPs of the run."""
        return self.path / "predicted.json"

    @property
    def lock(self) -> Path:
        """Advisory lock that a process of the run holds while it works."""
        return self.path / ".lock"

    def task_lock(self, task: int, tasks: int) -> Path:
        """Advisory lock of one task of a search that is shared by several jobs."""
        return self.path / f".task-{task}-of-{tasks}.lock"

    @property
    def metrics(self) -> Path:
        """Every event of the run, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """State of each stage in the last command, and how it ended."""
        return self.path / "status.json"

    @property
    def heartbeat(self) -> Path:
        """Empty file; its modification time is the time of the last progress."""
        return self.path / "heartbeat"

    @property
    def stacks(self) -> Path:
        """Stack traces of every rank, written when no rank makes progress."""
        return self.path / "stacks"

    @property
    def wandb_id(self) -> Path:
        """Run ID at wandb, so that a resumed run continues the same wandb run."""
        return self.path / "wandb.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def records(self) -> Path:
        """Folder of the records of finished stages."""
        return self.path / "stages"

    def record(self, stage: str) -> Path:
        """Record of a finished stage: its fingerprint, results and duration in seconds."""
        return self.records / f"{stage}.json"

    def record_paths(self) -> list[Path]:
        """Return the records that exist, in the order in which the stages finished."""
        return sorted(self.records.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name))

    @property
    def data(self) -> Path:
        """Tokenized corpora, one file prefix per source."""
        return self.path / "data"

    def alignment(self, number: int) -> Path:
        """Data of a round of alignment, from 1."""
        return self.path / "alignment" / f"{number}"

    @property
    def calibration(self) -> Path:
        """Tokenized corpora of the calibration text, one file prefix per source."""
        return self.path / "calibration"

    def unfinished(self, corpora: Path) -> Path:
        """Return the folder of a corpus whose tokenizing was interrupted; a path that does not exist if there is none.

        corpora: `data` or `calibration`.
        """
        return next(corpora.glob("*.partial"), corpora / "none.partial")

    @property
    def index(self) -> Path:
        """megatron-core's sample indices of the corpora."""
        return self.data / "index"

    @property
    def refit(self) -> Path:
        """Errors of each layer before and after the refit."""
        return self.path / "pruned" / "refit.json"

    @property
    def scores(self) -> Path:
        """Importance scores of units."""
        return self.path / "scores" / "scores.safetensors"

    @property
    def depth(self) -> Path:
        """Importance scores of layers."""
        return self.path / "scores" / "depth.json"

    @property
    def plan(self) -> Path:
        """Pruning plan: the indices that are kept."""
        return self.model("pruned") / "plan.json"

    @property
    def search_table(self) -> Path:
        """Candidates of a search with their costs and losses, and the winner."""
        return self.path / "search" / "table.json"

    @property
    def search_parts(self) -> Path:
        """Measurements of a search in progress: a folder per fingerprint, a file per candidate."""
        return self.path / "search" / "parts"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints: a folder per fingerprint."""
        return self.path / "checkpoints"

    def model(self, name: str) -> Path:
        """Hugging Face folder of a model: `corrected`, `pruned`, `distilled`, `aligned-1` and so on, `random`,
        `export`, `export-fp8`; or one that a Megatron checkpoint became, `imported-model` or `imported-student`."""
        return self.path / name

    @property
    def summary(self) -> Path:
        """One row of losses and scores for each model of the run."""
        return self.path / "summary.json"

    @property
    def evaluation(self) -> Path:
        """Results of the evaluation harness, a file per model, and the table of all."""
        return self.path / "evaluation"

    @property
    def evaluation_parts(self) -> Path:
        """Rows of an evaluation in progress: a folder per fingerprint, a file per model."""
        return self.evaluation / "parts"

    @property
    def bench(self) -> Path:
        """Throughput benchmarks: requests, commands, reports."""
        return self.path / "bench"

    @property
    def bench_table(self) -> Path:
        """Measured throughput of teacher and student."""
        return self.bench / "table.json"

    @property
    def plots(self) -> Path:
        """Plots of the report."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """Report of the run as one HTML page."""
        return self.path / "report.html"

    def files(self) -> Iterator[Path]:
        """Yield the entries of the folder, except for the lock."""
        if self.path.is_dir():
            yield from (path for path in sorted(self.path.iterdir()) if path != self.lock)
