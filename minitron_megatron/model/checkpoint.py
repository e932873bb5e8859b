"""Training checkpoints: mcore's distributed format, which loads at another layout, in a whole folder."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import PARTIAL, read_json, write_json
from ..parallel import Topology, barrier, collect_writes_here, separate_steps, torn_checkpoint_errors

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The only optimizer format of mcore 0.16 that loads at another tp, pp or dp."""

STATE = "state.json"
KEPT = 2


def save_checkpoint(
    folder: Path, step: int, chunks: Sequence[Any], optimizer: Any, state: Mapping[str, Any], topology: Topology
) -> None:
    """Writes `folder/step_N` with weights, optimizer and `state` (JSON), then drops all but the newest. Collective."""
    from megatron.core import dist_checkpointing

    path = folder / f"step_{step:08}"
    partial = path.with_name(path.name + PARTIAL)
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    with collect_writes_here():
        dist_checkpointing.save(_sharded(chunks, optimizer, is_loading=False), str(partial))
    barrier()
    if topology.rank == 0:
        write_json(partial / STATE, {**state, "step": step})
        partial.rename(path)
        for old in _steps(folder)[:-KEPT]:
            shutil.rmtree(old)
    barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, if there is one."""
    found = _steps(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, chunks: Sequence[Any], optimizer: Any, identity: str = "") -> dict[str, Any]:
    """Fills weights and optimizer from a checkpoint of any layout and returns its state. Collective.

    Raises CheckpointError where its state is not of the run `identity`, where it is torn, or where its pickled index
    asks for anything but plain metadata.
    """
    from megatron.core import dist_checkpointing

    check_metadata(path / ".metadata")
    _check_identity(path, identity)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._init_optimizer_states_with_dummy_values()  # mcore loads into states and makes none
    try:
        state: dict[str, Any] = read_json(path / STATE)
        loaded = dist_checkpointing.load(_sharded(chunks, optimizer, is_loading=True), path)
    except torn_checkpoint_errors() as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {_cause(error)}. Remove it to use the one before it."
        ) from error
    for number, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_key(number)])
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    return state


def _check_identity(path: Path, identity: str) -> None:
    try:
        theirs = read_json(path / STATE).get("identity", "")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error}. Remove it to use the one before it."
        ) from error
    if theirs != identity:
        raise CheckpointError(f"checkpoint {path} belongs to another run. Remove {path.parent} or give another --out.")


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that torch reports on, which it would print with whole tracebacks; else `error`."""
    for cause, _ in getattr(error, "failures", {}).values():
        return cause
    return error


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix != PARTIAL and (path / STATE).is_file())


def _key(number: int) -> str:
    return f"model{number}"


def _sharded(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """mcore's sharded state dict of the chunks (each wrapped by DDP) and the optimizer, without objects."""
    about = dict(RESHARDABLE)  # mcore writes this layout's groups into it
    state: dict[str, Any] = {
        _key(number): _tensors(chunk.module.sharded_state_dict(metadata=about)) for number, chunk in enumerate(chunks)
    }
    model = state[_key(0)] if len(chunks) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=about)
    return state


def _tensors(sharded: Mapping[str, Any]) -> dict[str, Any]:
    """Without mcore's `_extra_state` objects: they are empty here, and torch unpickles objects without any check."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}


ALLOWED = {  # not BytesStorageMetadata: what it names, torch unpickles without any check
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds only the plain classes that torch's checkpoint index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and name in (
            "float32",
            "float16",
            "bfloat16",
            "float64",
            "int64",
            "int32",
            "uint8",
        )
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def check_metadata(path: Path) -> None:
    """Raises CheckpointError unless torch's pickled index is plain metadata; torch itself would run anything."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except Exception as error:  # a spoilt pickle may raise anything
        raise CheckpointError(f"checkpoint index {path} is torn or not safe to open: {error}.") from error
