"""Training checkpoints: mcore's distributed format, which loads at another layout, in a whole folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from ..errors import CheckpointError
from ..files import PARTIAL, read_json, write_json
from ..parallel import (
    Topology,
    barrier,
    broadcast_object,
    fail_together,
    gather_objects,
    kill_writers,
    load_optimizer,
    save_sharded,
    torn_checkpoint_errors,
    undisturbed,
)
from .build import chunks_of
from .metadata import check_metadata
from .shards import adopt, named_shards
from .writing import cause_of, writing

__all__ = ["Checkpoints", "Trainee", "load_checkpoint", "load_weights"]

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The only optimizer format of mcore 0.16 that loads at another tp, pp or dp."""

STATE = "state.json"
SCORE = "score"


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

        score: what the best checkpoint has least of. wait: return when it is there. Raises CheckpointError where it
        cannot be written; what was there before stays.
        """
        self.poll(wait=True)
        partial = self._fresh(step)
        requests = []
        for trainee in trainees:
            sharded = _sharded(trainee, is_loading=False)
            needed = sum(gather_objects(_bytes(sharded)))
            with fail_together(), _writing():
                if self.topology.rank == 0:
                    (partial / trainee.name).mkdir(parents=True, exist_ok=True)
                    _expect_room(partial, needed)
            with _writing():
                requests.append(save_sharded(sharded, partial / trainee.name, later=self._queue is not None))

        def finish() -> None:
            self._finish(partial, step, {**state, SCORE: score, "step": step})

        if self._queue is None:
            return finish()
        requests[-1].add_finalize_fn(finish)
        for request in requests:
            self._queue.schedule_async_request(undisturbed(request))
        self.poll(wait=wait)

    def poll(self, *, wait: bool = False) -> None:
        """Finishes the checkpoint that is being written, if all ranks have written theirs. Collective."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with _writing():
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

    def _finish(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        barrier()
        with fail_together(), _writing():
            if self.topology.rank == 0:
                write_json(partial / STATE, state)
                path = self.folder / f"step_{step:08}"
                shutil.rmtree(path, ignore_errors=True)
                partial.rename(path)
                there = _steps(self.folder)
                for old in set(there) - set(there[-self.keep :]) - {_best(there)}:
                    shutil.rmtree(old)


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

    Raises CheckpointError where its state is not of the run `identity`, where it is torn, or where a pickled index asks
    for anything but plain metadata; what is filled is then half old and half new.
    """
    from megatron.core import dist_checkpointing

    for trainee in trainees:
        check_metadata(path / trainee.name / ".metadata")
    state = _state(path, identity)
    for trainee in trainees:
        for part in getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer]):
            part._init_optimizer_states_with_dummy_values()  # mcore loads into states and makes none
        try:
            loaded = dist_checkpointing.load(_sharded(trainee, is_loading=True), path / trainee.name)
        except torn_checkpoint_errors() as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {cause_of(error)}.") from error
        for number, chunk in enumerate(trainee.chunks):
            chunk.module.load_state_dict(loaded[_key(number)])
        load_optimizer(trainee.optimizer, loaded["optimizer"])
    return state


def load_weights(path: Path, model: Any, topology: Topology, identity: str = "") -> None:
    """Fills a plain model, on `meta` or not, from a checkpoint of any layout. Collective; raises as load_checkpoint."""
    from megatron.core import dist_checkpointing

    check_metadata(path / ".metadata")
    _state(path, identity)
    chunks = chunks_of(model)
    for shard in named_shards(chunks):
        adopt(shard, torch.empty_like(shard.tensor, device=topology.device))
    state = {
        _key(at): _tensors(chunk.sharded_state_dict(metadata=dict(RESHARDABLE))) for at, chunk in enumerate(chunks)
    }
    try:
        loaded = dist_checkpointing.load(state, path)
    except torn_checkpoint_errors() as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {cause_of(error)}.") from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_key(number)], strict=False)  # without mcore's empty objects


def _state(path: Path, identity: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_json(path / STATE)
        theirs = state.get("identity", "")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {cause_of(error)}.") from error
    if theirs != identity:
        raise CheckpointError(f"checkpoint {path} belongs to another run.")
    return state


def _writing() -> AbstractContextManager[None]:
    return writing("a checkpoint", "The ones before it are whole; make room and run again.")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix != PARTIAL and (path / STATE).is_file())


def _best(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the least score, the newest of equals; none where none was scored."""
    scores = {path: read_json(path / STATE).get(SCORE) for path in checkpoints}
    scored = [path for path in reversed(checkpoints) if scores[path] is not None]
    return min(scored, key=lambda path: scores[path], default=None)


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
