"""The safetensors of a Hugging Face folder: checked by their headers, read by slices, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from ..files import file_marks, read_json

__all__ = ["SafetensorsWriter", "Weights", "stored"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = {"F64": torch.float64} | {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
SCALES = ("_scale", "_scale_inv")
BLOCK = 2**24
"""Numbers that are compared at once."""
COMPARED: dict[tuple[str, str, str], bool] = {}
"""(the files' marks, two tensors) -> whether they are alike."""


class Weights:
    """The tensors of a folder by name, in the files that transformers reads.

    `bytes_read` counts the bytes of the slices asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = _files(folder)
        self._slices = _slices(self._files)
        if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            _refuse_unlike(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, read from the header."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor, read from the header."""
        return FLOATS[self._slices[name].get_dtype()]

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """The slice `[start, stop)` of each dim named (the others whole), in the file's dtype."""
        wanted = tuple(slice(start, stop) for start, stop in ranges) or slice(None)
        tensor: Tensor = self._slices[name][wanted]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def rename(self, old: str, new: str) -> None:
        """Call a tensor otherwise than its file does."""
        self._slices[new] = self._slices.pop(old)

    def alike(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and numbers. The same files are compared once."""
        key = (str(file_marks(self._files)), one, other)
        if key not in COMPARED:
            COMPARED[key] = _alike(self._slices[one], self._slices[other])
        return COMPARED[key]

    def refuse_quantised(self) -> None:
        """Raise CheckpointError at a tensor that is no plain matrix of floating-point numbers."""
        for name, part in self._slices.items():
            if part.get_dtype() not in FLOATS or name.endswith(SCALES):
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {part.get_dtype()}, of quantised weights, which are not read. "
                    "Give the folder of the model before it was quantised."
                )


def stored(folder: Path) -> Weights | None:
    """The tensors of a folder; None where it has none that can be read, as one of a config alone."""
    try:
        return Weights(folder)
    except CheckpointError:
        return None


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads: one, or those of an index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    raise CheckpointError(
        f"model {folder} has no model.safetensors and no {INDEX}. Save it with safe_serialization=True."
    )


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        weight_map = read_json(index)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (FileError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is torn or not an index ({error}). Copy it again.") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is no file of its folder. Copy the model again.")
    return [folder / file for file in files]


def _slices(files: Sequence[Path]) -> dict[str, Any]:
    """Name -> slice of every tensor in some files."""
    found: dict[str, Any] = {}
    owner: dict[str, Path] = {}
    for file in files:
        opened = _open(file)
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            if name in found:
                raise CheckpointError(f"{file} and {owner[name].name} both hold {name}. Remove the wrong one.")
            found[name], owner[name] = opened.get_slice(name), file
    return found


def _refuse_unlike(folder: Path) -> None:
    """Raise CheckpointError where the one file, which transformers reads, and those of the index hold other tensors."""
    files = [folder / SINGLE, *_indexed(folder)]
    if len(set(files)) > 1 and not _same_tensors(str(folder), str(file_marks(files))):
        raise CheckpointError(
            f"{folder} holds model.safetensors and {INDEX}, and their tensors differ. Remove the one that is stale."
        )


@cache
def _same_tensors(folder: str, marks: str) -> bool:
    """marks: of the files, so that the same ones are compared once."""
    single, several = (_slices(files) for files in ([Path(folder) / SINGLE], _indexed(Path(folder))))
    return single.keys() == several.keys() and all(_alike(single[name], several[name]) for name in single)


def _alike(one: Any, other: Any) -> bool:
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    if len(shape) < 2:
        return torch.equal(one[:].double(), other[:].double())
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    return all(
        torch.equal(one[at : at + rows].double(), other[at : at + rows].double()) for at in range(0, shape[0], rows)
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
