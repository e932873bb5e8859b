"""Safe reading of a distributed checkpoint's format, index and common values.

Both the index and the common values are pickles. They are read with an allow-list; torch itself would unpickle an
index, and so run, anything.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from typing_extensions import TypedDict

from ..errors import CheckpointError
from ..files import read_as
from .writing import cause_of

__all__ = ["check_backend", "check_format", "check_metadata", "read_common", "read_index"]


class Format(TypedDict):
    """Content of mcore's `metadata.json`."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: int
    common_backend: NotRequired[Literal["torch"]]
    """mcore 0.19 writes neither this key nor the next."""
    common_backend_version: NotRequired[int]


class Unopened:
    """Stand-in for an object of any other class in a pickle: it keeps the object's attributes, and runs nothing."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def check_backend(folder: Path) -> None:
    """Raise FileError, which names the file, unless a folder has the only format that is written and read here."""
    read_as(folder / "metadata.json", Format)


def check_format(folder: Path) -> None:
    """Raise CheckpointError or FileError, which name the file, unless mcore and torch can open a folder that was
    written here without running code of it."""
    check_backend(folder)
    check_metadata(folder / ".metadata")
    common = folder / "common.pt"
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{common} is damaged or not safe to open: {cause_of(error)}.") from error


def read_common(path: Path) -> dict[str, Any]:
    """Return the values of `common.pt`, with a stand-in for every object that is no tensor and no plain value.

    torch's weights-only loader builds them, and is given the stand-in for each class that it does not know. Raises
    CheckpointError.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Unopened, name) for name in unknown]):
            values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return values
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged or not safe to open: {cause_of(error)}.") from error


ALLOWED = {  # not BytesStorageMetadata: torch unpickles the objects that it refers to without any check
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
    """Unpickler that allows only the plain classes of torch's checkpoint index."""

    def find_class(self, module: str, name: str) -> object:
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
        return self.other(module, name)

    def other(self, module: str, name: str) -> type:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _IndexUnpickler(_MetadataUnpickler):
    """The same with a stand-in for every other class, since the caller opens tensors alone."""

    def other(self, module: str, name: str) -> type:
        return Unopened


def check_metadata(path: Path) -> None:
    """Raise CheckpointError unless torch's pickled index contains only plain metadata."""
    _unpickled(path, _MetadataUnpickler)


def read_index(path: Path) -> Any:
    """Return torch's checkpoint index, with stand-ins for what is not metadata of tensors. Raises CheckpointError."""
    return _unpickled(path, _IndexUnpickler)


def _unpickled(path: Path, kind: type[pickle.Unpickler]) -> Any:
    try:
        with path.open("rb") as file:
            return kind(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"checkpoint index {path} is damaged or not safe to open: {cause_of(error)}.") from error
