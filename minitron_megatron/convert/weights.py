"""The safetensors of a Hugging Face folder: checked by their headers, read by slices, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json

__all__ = ["SafetensorsWriter", "Weights"]

INDEX = "model.safetensors.index.json"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Weights:
    """The tensors of a folder by name. `bytes_read` counts the bytes of the slices asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._slices: dict[str, Any] = {}
        for file in _files(folder):
            opened = _open(file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                self._slices[name] = opened.get_slice(name)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, read from the header."""
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """The slice `[start, stop)` of each dim named (the others whole), in the file's dtype."""
        wanted = tuple(slice(start, stop) for start, stop in ranges) or slice(None)
        tensor: Tensor = self._slices[name][wanted]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is torn or not an index ({error}). Copy it again.") from error
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise CheckpointError(
        f"model {folder} has no model.safetensors and no {INDEX}. Save it with safe_serialization=True."
    )


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is torn or not a safetensors file ({error}). Copy it again.") from error


class SafetensorsWriter:
    """Writes one safetensors file a tensor at a time, in the order announced; the library would want them all at once.

    Format: 8 bytes little-endian header length, a JSON header, the raw bytes (safetensors' README).
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        self._waiting = list(entries)
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in entries:
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor announced; any device, any strides."""
        expected, shape = self._waiting.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, self._dtype), (
            f"{name} came before {expected}"
        )
        self._file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or not self._waiting, f"{len(self._waiting)} announced tensors were not written"


def split_files(entries: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensor names in order, cut into files of at most `limit` bytes (one tensor at least)."""
    files: list[list[str]] = [[]]
    room = limit
    for name, size in entries.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files
