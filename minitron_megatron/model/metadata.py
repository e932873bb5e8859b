"""The pickled index of torch's distributed checkpoints, opened with an allow-list: torch itself would run anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

__all__ = ["check_metadata"]

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
