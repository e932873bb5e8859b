"""Training checkpoints: mcore's distributed format, which loads at another layout, in a whole folder."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired
from uuid import uuid4

import torch
from typing_extensions import TypedDict

from ..errors import CheckpointError, FileError
from ..files import MANIFEST, PARTIAL, check_as, read_as, read_json, verify_checksums, write_checksums, write_json
from ..parallel import (
    Topology,
    barrier,
    broadcast_object,
    fail_together,
    gather_objects,
    kill_writers,
    load_optimizer,
    place_in_world,
    save_sharded,
    undisturbed,
)
from .build import chunks_of
from .metadata import check_format
from .shards import assign, named_shards
from .writing import reading, writing

__all__ = ["Checkpoints", "Trainee", "load_checkpoint", "load_weights"]

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The only optimizer format of mcore 0.16 that loads at another tp, pp or dp."""

STATE = "state.json"
SUMS = "sums"
"""The suffix of the checksums of what one rank wrote, until the first rank gathers them."""


class State(TypedDict):
    """What a checkpoint says of itself, beside what its caller keeps in it."""

    step: int
    score: float | None
    identity: NotRequired[str]


@dataclass(frozen=True)
class Trainee:
    """What a checkpoint holds of a model in training."""

    chunks: Sequence[Any]
    """Each wrapped by mcore's DDP."""
    optimizer: Any
    name: str = ""
    """Tells the models of one checkpoint apart."""


class Checkpoints:
    """The checkpoints of a run in `folder`: `step_N`, each whole or absent. The newest `keep` stay, and the best.

    Where `asynchronous`, a forked process of each rank writes while training goes on, one checkpoint at a time.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder, self.topology, self.keep = folder, topology, keep
        self._queue: Any = None
        if asynchronous:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()

    def save(
        self,
        step: int,
        trainees: Sequence[Trainee],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Writes `step_N` with weights, optimizers and `state` (JSON), then drops what need not stay. Collective.

        score: what the best checkpoint has least of; one that is not finite is none. wait: return when it is there.
        Raises CheckpointError where it cannot be written; what was there before stays.
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
        """Finishes the checkpoint that is being written, if all ranks have written theirs. Collective."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._writing():
                self._queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        """Gives up what is being written. Not collective."""
        for call in self._queue.async_calls if self._queue is not None else ():
            kill_writers(call.async_caller)

    def newest_first(self) -> list[Path]:
        """Those that are whole."""
        return _steps(self.folder)[::-1]

    def steps(self) -> dict[int, Path]:
        """Those that are whole, by step."""
        return {int(path.name.removeprefix("step_")): path for path in _steps(self.folder)}

    def best(self) -> Path | None:
        """The one with the least score; None where none was scored."""
        return _best(_steps(self.folder))

    def _fresh(self, step: int) -> Path:
        """A new folder's path, alike on every rank: a killed run's writers may still be at work in their own."""
        ticket = broadcast_object(uuid4().hex[:8])
        if self.topology.rank == 0:
            for left in self.folder.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
        return self.folder / f"step_{step:08}.{ticket}{PARTIAL}"

    def _finish(self, fresh: Path, step: int, state: Mapping[str, Any]) -> None:
        barrier()
        with fail_together(), self._writing():
            if self.topology.rank == 0:
                write_json(fresh / STATE, state)
                _write_manifest(fresh)
                path = self.folder / f"step_{step:08}"
                shutil.rmtree(path, ignore_errors=True)
                fresh.rename(path)
                there = _steps(self.folder)
                for old in set(there) - set(there[-self.keep :]) - {_best(there)}:
                    shutil.rmtree(old)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"a checkpoint in {self.folder}", "The ones before it are whole; make room and run again.")


def _write_and_sum(write: Any, folder: Path, rank: int, *args: Any, **options: Any) -> None:
    """mcore's writing process of one rank, which then reads what it wrote, beside the training."""
    write(*args, **options)
    with suppress(FileError, OSError):  # what could not be written, mcore tells
        _sum_own(folder, rank)


def _sum_own(folder: Path, rank: int) -> None:
    """Writes the checksums of what a rank wrote into `folder`."""
    write_checksums(folder / f"{rank}.{SUMS}", folder.glob(f"*__{rank}_*.distcp"))


def _write_manifest(folder: Path) -> None:
    """Gathers the ranks' checksums into one list, with those of the small files that the first rank alone wrote."""
    known: dict[str, str] = {}
    for file in folder.rglob(f"*.{SUMS}"):
        place = file.parent.relative_to(folder)
        known |= {str(place / name): digest for name, digest in read_as(file, dict[str, str]).items()}
        file.unlink()
    others = (file for file in folder.rglob("*") if file.is_file() and str(file.relative_to(folder)) not in known)
    write_checksums(folder / MANIFEST, others, known)


def _bytes(sharded: Mapping[str, Any]) -> int:
    """Of what this rank writes of it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    kinds = (ShardedTensor, ShardedTensorFactory)
    mine = [each for each in nested_values(sharded) if isinstance(each, kinds) and is_main_replica(each.replica_id)]
    return sum(each.data.nbytes for each in mine if each.data is not None)


def _expect_room(folder: Path, needed: int) -> None:
    """Raises OSError where a file system is too full for so many bytes: found out in the middle of writing, one rank
    would fail where the others wait for it."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space left for a checkpoint: {needed:,} bytes, and {free:,} are free")


def load_checkpoint(path: Path, trainees: Sequence[Trainee], identity: str = "") -> dict[str, Any]:
    """Fills weights and optimizers from a checkpoint of any layout and returns its state. Collective.

    Raises CheckpointError, before anything is filled, where a file differs from what was written, where its state is
    not of the run `identity`, or where a pickled index asks for anything but plain metadata; and where mcore cannot
    read it, what is filled is then half old and half new.
    """
    from megatron.core import dist_checkpointing

    state = _verified(path, identity, [trainee.name for trainee in trainees])
    for trainee in trainees:
        for part in getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer]):
            part._init_optimizer_states_with_dummy_values()  # mcore loads into states and makes none
        with reading(path):
            loaded = dist_checkpointing.load(_sharded(trainee, is_loading=True), path / trainee.name)
            for number, chunk in enumerate(trainee.chunks):
                chunk.module.load_state_dict(loaded[_key(number)])
            load_optimizer(trainee.optimizer, loaded["optimizer"])
    return state


def load_weights(path: Path, model: Any, topology: Topology, identity: str = "") -> None:
    """Fills a plain model, on `meta` or not, from a checkpoint of any layout. Collective; raises as load_checkpoint."""
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


def _verified(path: Path, identity: str, names: Sequence[str]) -> dict[str, Any]:
    """The state of a checkpoint of the run `identity` whose files are all as they were written: each rank reads its
    share of them. Collective over the world."""
    with fail_together():
        try:
            for name in names:
                check_format(path / name)
            verify_checksums(path / MANIFEST, share=place_in_world())
            state: dict[str, Any] = read_json(path / STATE)
            check_as(state, State, str(path / STATE))
        except FileError as error:
            raise CheckpointError(f"checkpoint {path} is not whole: {error}") from error
        if state.get("identity", "") != identity:
            raise CheckpointError(f"checkpoint {path} belongs to another run.")
    return state


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix != PARTIAL and (path / STATE).is_file())


def _best(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the least score, the newest of equals; none where none was scored."""
    scores = {path: score for path in reversed(checkpoints) if (score := _score(path)) is not None}
    return min(scores, key=lambda path: scores[path], default=None)


def _score(path: Path) -> float | None:
    """None where a checkpoint was not scored, or does not say so legibly."""
    try:
        return read_as(path / STATE, State)["score"]
    except FileError:
        return None


def _key(number: int) -> str:
    return f"model{number}"


def _sharded(trainee: Trainee, *, is_loading: bool) -> dict[str, Any]:
    """mcore's sharded state dict of a model's chunks and its optimizer, without objects."""
    about = dict(RESHARDABLE)  # mcore writes this layout's groups into it
    state: dict[str, Any] = {
        _key(number): _tensors(chunk.module.sharded_state_dict(metadata=about))
        for number, chunk in enumerate(trainee.chunks)
    }
    model = state[_key(0)] if len(trainee.chunks) == 1 else dict(state)
    state["optimizer"] = trainee.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=about)
    return state


def _tensors(sharded: Mapping[str, Any]) -> dict[str, Any]:
    """Without mcore's `_extra_state` objects: they are empty here, and torch unpickles objects without any check."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}
