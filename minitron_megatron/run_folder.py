"""Names of everything in a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, whether they exist or not."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Return the folder of a run that has begun. Raises CheckpointError for any other."""
        folder = cls(path)
        if not folder.recipe.is_file():
            raise CheckpointError(
                f"{path} is not a run folder: it has no {folder.recipe.name}. Give the `out` of a recipe."
            )
        return folder

    @property
    def recipe(self) -> Path:
        """Recipe of the last start, with every default written out."""
        return self.path / "recipe.yaml"

    @property
    def versions(self) -> Path:
        """Versions of the installed packages, this project's commit, the machine and the number of processes."""
        return self.path / "versions.json"

    @property
    def predicted(self) -> Path:
        """Parameters, bytes and FLOPs that the run should need."""
        return self.path / "predicted.json"

    @property
    def lock(self) -> Path:
        """Advisory lock that a run holds while it is at work."""
        return self.path / ".lock"

    def task_lock(self, task: int, tasks: int) -> Path:
        """Advisory lock of one task of a search that is shared by several jobs."""
        return self.path / f".task-{task}-of-{tasks}.lock"

    @property
    def metrics(self) -> Path:
        """Every event of the run, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        """Empty file whose modification time is that of the last progress."""
        return self.path / "heartbeat"

    @property
    def stacks(self) -> Path:
        """Stack traces of every rank, written where no rank makes progress."""
        return self.path / "stacks"

    @property
    def wandb_id(self) -> Path:
        """Identity of this run at wandb, so that a resumed run continues it."""
        return self.path / "wandb.json"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.path / "tensorboard"

    @property
    def records(self) -> Path:
        """Folder of the finished stages' records."""
        return self.path / "stages"

    def record(self, stage: str) -> Path:
        """Fingerprint, results and seconds of a finished stage."""
        return self.records / f"{stage}.json"

    def record_paths(self) -> list[Path]:
        """Records that exist, in the order in which the stages ended."""
        return sorted(self.records.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name))

    @property
    def data(self) -> Path:
        """Tokenized corpora, one prefix a source."""
        return self.path / "data"

    @property
    def index(self) -> Path:
        """megatron-core's sample indices of the corpora."""
        return self.data / "index"

    @property
    def scores(self) -> Path:
        """Importance of units."""
        return self.path / "scores" / "scores.safetensors"

    @property
    def depth(self) -> Path:
        """Importance of layers."""
        return self.path / "scores" / "depth.json"

    @property
    def plan(self) -> Path:
        """Kept indices of the cut."""
        return self.model("pruned") / "plan.json"

    @property
    def search_table(self) -> Path:
        """Candidates of a search with their costs, losses and the winner."""
        return self.path / "search" / "table.json"

    @property
    def search_parts(self) -> Path:
        """Measurements of a search at work, a folder a fingerprint, a file a candidate."""
        return self.path / "search" / "parts"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints, a folder a fingerprint."""
        return self.path / "checkpoints"

    def model(self, name: str) -> Path:
        """Hugging Face folder of a model: `corrected`, `pruned`, `distilled`, `random`, `export` or `export-fp8`."""
        return self.path / name

    @property
    def summary(self) -> Path:
        """One row of losses and scores for each model of the run."""
        return self.path / "summary.json"

    @property
    def evaluation(self) -> Path:
        """Results of the evaluation harness, a file a model, and their table."""
        return self.path / "evaluation"

    @property
    def evaluation_parts(self) -> Path:
        """Rows of an evaluation at work, a folder a fingerprint, a file a model."""
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
        """Pictures of the report."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """Report of the run as one HTML page."""
        return self.path / "report.html"

    def files(self) -> Iterator[Path]:
        """Yield what lies in the folder besides the lock."""
        if self.path.is_dir():
            yield from (path for path in sorted(self.path.iterdir()) if path != self.lock)
