"""Training checkpoints in mcore's distributed format, which loads at any layout; each folder is whole or absent."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, ParamSpec
from uuid import uuid4

import torch
from typing_extensions import TypedDict

from ..errors import CheckpointError, FileError
from ..files import (
    MANIFEST,
    PARTIAL,
    check_as,
    put_in_place,
    read_as,
    read_json,
    verify_checksums,
    write_checksums,
    write_json,
)
from ..parallel import (
    Topology,
    barrier,
    broadcast_object,
    drop_absent_states,
    fail_together,
    gather_objects,
    keep_own_states,
    kill_writers,
    load_optimizer,
    place_in_world,
    save_sharded,
    undisturbed,
)
from .chunk import Model, WrappedChunk, chunks_of
from .metadata import check_format
from .shards import assign, named_shards
from .writing import reading, writing

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.optimizer import MegatronOptimizer

__all__ = ["CheckpointState", "Checkpoints", "Trainee", "load_checkpoint", "load_weights"]

RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""Only optimizer format of mcore 0.16 that loads at another tp, pp or dp. The first data-parallel rank, which writes
the states, gathers them in host memory; by default every rank would, on its GPU."""

STEP, STATE = "step_", "state.json"
SUMS = "sums"
"""Suffix of the file with the checksums of one rank's files, until rank 0 merges them."""

P = ParamSpec("P")


CheckpointState = dict[str, Any]
"""Content of a checkpoint's `state.json`: the keys of `State`, and those that the caller gave."""


class State(TypedDict):
    """Keys of a checkpoint's `state.json` that are set here; the caller adds its own."""

    step: int
    score: float | None
    identity: NotRequired[str]


@dataclass(frozen=True)
class Trainee:
    """Model in training, as a checkpoint holds it."""

    chunks: Sequence[WrappedChunk]
    optimizer: MegatronOptimizer
    name: str = ""
    """Subfolder of the checkpoint, to tell several models apart."""


class Checkpoints:
    """Checkpoints of a run in `folder`: `step_N`, each whole or absent. The newest `keep` and the best are kept.

    If `asynchronous`, a forked process of each rank writes while training continues, one checkpoint at a time.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder, self.topology, self.keep = folder, topology, keep
        self._queue: AsyncCallsQueue | None = None
        if asynchronous:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()

    def save(
        self,
        step: int,
        trainees: Sequence[Trainee],
        state: Mapping[str, object],
        *,
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Write `step_N` with weights, optimizers and `state` (JSON), then remove superseded checkpoints. Collective.

        score: the best checkpoint has the lowest one; a value that is not finite counts as none. wait: return only
        after the checkpoint is complete. Raises CheckpointError where it cannot be written; earlier checkpoints are
        kept.
        """
        self.poll(wait=True)
        fresh = self._fresh(step)
        requests = []
        for trainee in trainees:
            sharded, folder = _sharded(trainee, is_loading=False), fresh / trainee.name
            needed = sum(gather_objects(_bytes(sharded)))
            with fail_together(), self._writing():
                if self.topology.rank == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    _expect_room(fresh, needed)
            with self._writing():
                requests.append(save_sharded(sharded, folder, later=self._queue is not None))
                if self._queue is None:
                    _sum_own(folder, self.topology.rank)
        score = score if score is not None and math.isfinite(score) else None

        def finish() -> None:
            self._finish(fresh, step, {**state, "score": score, "step": step})

        if self._queue is None:
            return finish()
        requests[-1].add_finalize_fn(finish)
        for request, trainee in zip(requests, trainees, strict=True):
            summed = request.async_fn and partial(
                _write_and_sum, request.async_fn, fresh / trainee.name, self.topology.rank
            )
            self._queue.schedule_async_request(undisturbed(request._replace(async_fn=summed)))
        self.poll(wait=wait)

    def poll(self, *, wait: bool = False) -> None:
        """Finalise the checkpoint in progress, if all ranks have written their part. Collective."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._writing():
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Abandon the checkpoint in progress. Not collective."""
        for call in self._queue.async_calls if self._queue is not None else ():
            kill_writers(call.async_caller)

    def newest_first(self) -> list[Path]:
        """Return the complete checkpoints, newest first."""
        return _steps(self.folder)[::-1]

    def steps(self) -> dict[int, Path]:
        """Return the complete checkpoints by step."""
        return {int(path.name.removeprefix(STEP)): path for path in _steps(self.folder)}

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest score; None where none has a score."""
        return _best(_steps(self.folder))

    def _fresh(self, step: int) -> Path:
        """Return a new path, the same on every rank: writers of a killed run may still write to their own folder."""
        ticket = broadcast_object(uuid4().hex[:8])
        if self.topology.rank == 0:
            for left in self.folder.glob(f"{STEP}*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        return self.folder / f"{STEP}{step:08}.{ticket}{PARTIAL}"

    def _finish(self, fresh: Path, step: int, state: Mapping[str, object]) -> None:
        barrier()
        with fail_together(), self._writing():
            if self.topology.rank == 0:
                write_json(fresh / STATE, state)
                _write_manifest(fresh)
                put_in_place(fresh, self.folder / f"{STEP}{step:08}")
                existing = _steps(self.folder)
                for old in set(existing) - set(existing[-self.keep :]) - {_best(existing)}:
                    shutil.rmtree(old)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"a checkpoint in {self.folder}", "Earlier ones are complete; make room and run again.")


def _write_and_sum(write: Callable[P, object], folder: Path, rank: int, *args: P.args, **options: P.kwargs) -> None:
    """Run mcore's writer of one rank, in its own process, then compute the checksums of its files."""
    write(*args, **options)
    with suppress(FileError, OSError):  # mcore reports failed writes
        _sum_own(folder, rank)


def _sum_own(folder: Path, rank: int) -> None:
    """Write the checksums of the files that a rank wrote into `folder`."""
    write_checksums(folder / f"{rank}.{SUMS}", folder.glob(f"*__{rank}_*.distcp"))


def _write_manifest(folder: Path) -> None:
    """Merge the ranks' checksums into one manifest, with those of the small files that only rank 0 wrote."""
    known: dict[str, str] = {}
    for file in folder.rglob(f"*.{SUMS}"):
        place = file.parent.relative_to(folder)
        known |= {str(place / name): digest for name, digest in read_as(file, dict[str, str]).items()}
        file.unlink()
    others = (file for file in folder.rglob("*") if file.is_file() and str(file.relative_to(folder)) not in known)
    write_checksums(folder / MANIFEST, others, known)


def _bytes(sharded: ShardedStateDict) -> int:
    """Return the bytes of a sharded state dict that this rank writes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    kinds = (ShardedTensor, ShardedTensorFactory)
    own = [each for each in nested_values(sharded) if isinstance(each, kinds) and is_main_replica(each.replica_id)]
    return sum(each.data.nbytes for each in own if each.data is not None)


def _expect_room(folder: Path, needed: int) -> None:
    """Raise OSError where the file system has less than `needed` bytes free.

    Checked before writing: in the middle of it, one rank would fail while the others wait for it.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space left for a checkpoint: it needs {needed:,} bytes, and {free:,} are free")


def load_checkpoint(path: Path, trainees: Sequence[Trainee], identity: str = "") -> CheckpointState:
    """Load weights and optimizers from a checkpoint of any layout and return its state. Collective.

    Raises CheckpointError, before anything is loaded, where a file has changed since it was written, where the
    checkpoint is not of the run `identity`, or where a pickled index contains more than plain metadata. Raises it too
    where mcore cannot read the checkpoint; the model may then be partly loaded.
    """
    from megatron.core import dist_checkpointing

    state = _verified(path, identity, [trainee.name for trainee in trainees])
    for trainee in trainees:
        for part in getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer]):
            part._init_optimizer_states_with_dummy_values()  # mcore loads into existing states only
        with reading(path):
            wanted = _sharded(trainee, is_loading=True)
            keep_own_states(trainee.optimizer, wanted["optimizer"])
            # unchecked: the check is whether the first data-parallel ranks alone would read everything
            loaded = dist_checkpointing.load(wanted, path / trainee.name, validate_access_integrity=False)
            for number, chunk in enumerate(trainee.chunks):
                chunk.module.load_state_dict(loaded[_key(number)])
            load_optimizer(trainee.optimizer, loaded["optimizer"])
    return state


def load_weights(path: Path, model: Model, topology: Topology, identity: str = "") -> None:
    """Load the weights of a plain model, on `meta` or not, from a checkpoint of any layout.

    Collective. Raises CheckpointError as `load_checkpoint` does.
    """
    from megatron.core import dist_checkpointing

    _verified(path, identity, [""])
    chunks = chunks_of(model)
    for shard in named_shards(chunks):
        assign(shard, torch.empty_like(shard.tensor, device=topology.device))
    state = {
        _key(at): _tensors(chunk.sharded_state_dict(metadata=dict(RESHARDABLE))) for at, chunk in enumerate(chunks)
    }
    with reading(path):
        loaded = dist_checkpointing.load(state, path)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[_key(number)], strict=False)  # without mcore's empty objects


def _verified(path: Path, identity: str, names: Sequence[str]) -> CheckpointState:
    """Return a checkpoint's state after verifying its run `identity` and the checksums of all its files.

    Each rank reads its share of the files. Collective over the world.
    """
    with fail_together():
        try:
            for name in names:
                check_format(path / name)
            verify_checksums(path / MANIFEST, share=place_in_world())
            state: CheckpointState = read_json(path / STATE)
            check_as(state, State, str(path / STATE))
        except FileError as error:
            raise CheckpointError(f"checkpoint {path} is not whole: {error}") from error
        if state.get("identity", "") != identity:
            raise CheckpointError(f"checkpoint {path} belongs to another run.")
    return state


def _steps(folder: Path) -> list[Path]:
    named = (path for path in folder.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdecimal())
    return sorted(path for path in named if (path / STATE).is_file())


def _best(checkpoints: Sequence[Path]) -> Path | None:
    """Return the checkpoint with the lowest score, the newest of a tie; None where none has a score."""
    scores = {path: score for path in reversed(checkpoints) if (score := _score(path)) is not None}
    return min(scores, key=lambda path: scores[path], default=None)


def _score(path: Path) -> float | None:
    """Return a checkpoint's score; None where it has none, or its state cannot be read."""
    try:
        return read_as(path / STATE, State)["score"]
    except FileError:
        return None


def _key(number: int) -> str:
    return f"model{number}"


def _sharded(trainee: Trainee, *, is_loading: bool) -> ShardedStateDict:
    """Return mcore's sharded state dict of a model's chunks and its optimizer, without objects."""
    metadata = dict(RESHARDABLE)  # a copy, since mcore adds this layout's groups to it
    state: ShardedStateDict = {
        _key(number): _tensors(chunk.module.sharded_state_dict(metadata=metadata))
        for number, chunk in enumerate(trainee.chunks)
    }
    model = state[_key(0)] if len(trainee.chunks) == 1 else dict(state)
    state["optimizer"] = trainee.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    drop_absent_states(state["optimizer"])
    return state


def _tensors(sharded: ShardedStateDict) -> ShardedStateDict:
    """Drop mcore's `_extra_state` objects: they are empty here, and torch unpickles objects without any check."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}
