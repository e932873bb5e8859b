"""Safety checks of a distributed checkpoint before mcore and torch open it: its format, and its pickles.

The pickled index is read with an allow-list; torch itself would unpickle, and so run, anything.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import TypedDict

from ..errors import CheckpointError
from ..files import read_as
from .writing import cause_of

__all__ = ["check_format", "check_metadata"]


class Format(TypedDict):
    """Content of mcore's `metadata.json`."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: int
    common_backend: Literal["torch"]
    common_backend_version: int


def check_format(folder: Path) -> None:
    """Raise CheckpointError or FileError, which name the file, unless a folder has the only format written here, and
    its index and common values contain no code."""
    read_as(folder / "metadata.json", Format)
    check_metadata(folder / ".metadata")
    common = folder / "common.pt"
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{common} is torn or not safe to open: {cause_of(error)}.") from error


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
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def check_metadata(path: Path) -> None:
    """Raise CheckpointError unless torch's pickled index contains only plain metadata."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"checkpoint index {path} is torn or not safe to open: {cause_of(error)}.") from error
