"""Safetensors of a Hugging Face folder: headers checked, slices read, files written as a stream."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from ..files import file_marks, read_json

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = ["SafetensorsWriter", "Weights", "conversion", "stored"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = {"F64": torch.float64} | {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
SCALES = ("_scale", "_scale_inv")
CONVERT = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; old, new = {!r}, {!r}; "
    "M.from_pretrained(old, dtype='auto').save_pretrained(new); T.from_pretrained(old).save_pretrained(new)"
)
"""Python that writes a folder of `.bin` files as one of safetensors."""
BLOCK = 2**24
"""Elements compared at once."""


class Slice(Protocol):
    """Tensor of a safetensors file; indexing reads the part that is asked for."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, place: slice | tuple[slice, ...]) -> Tensor: ...


COMPARED: dict[tuple[str, str, str], bool] = {}
"""Cache: (marks of the files, two tensor names) -> whether the tensors are equal."""


class Weights:
    """Tensors of a folder by name, from the files that transformers reads.

    `bytes_read` counts the bytes of all slices read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = _files(folder)
        self._slices = _slices(self._files)
        if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            _refuse_conflict(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def names(self) -> list[str]:
        """Return all tensor names, sorted."""
        return sorted(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, from the header."""
        return FLOATS[self._slices[name].get_dtype()]

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read the slice [start, stop) of each leading dim given (other dims whole), in the file's dtype."""
        wanted = tuple(slice(start, stop) for start, stop in ranges) or slice(None)
        tensor: Tensor = self._slices[name][wanted]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name than its file does."""
        self._slices[new] = self._slices.pop(old)

    def same_values(self, one: str, other: str) -> bool:
        """Return whether two tensors have the same shape and values; cached for unchanged files."""
        key = (str(file_marks(self._files)), one, other)
        if key not in COMPARED:
            COMPARED[key] = _equal(self._slices[one], self._slices[other])
        return COMPARED[key]

    def refuse_quantised(self) -> None:
        """Raise CheckpointError for quantised weights: a tensor that is a scale or has no floating-point dtype."""
        for name, part in self._slices.items():
            if part.get_dtype() not in FLOATS or name.endswith(SCALES):
                raise CheckpointError(
                    f"{self.folder}: {name} ({part.get_dtype()}) belongs to quantised weights, which cannot be read. "
                    "Give the folder of the model before quantisation."
                )


class _UnreadableError(CheckpointError):
    """The weights are missing, or their place is taken by something else, such as a Git LFS pointer."""


def stored(folder: Path) -> Weights | None:
    """Return the tensors of a folder; None if none can be read, as in a folder with only a config.

    Raises CheckpointError where files contradict each other.
    """
    try:
        return Weights(folder)
    except _UnreadableError:
        return None


def _files(folder: Path) -> list[Path]:
    """Return the files that transformers reads: the single one, else those of the index."""
    if (adapter := folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{adapter} belongs to an adapter, which would change the model. Merge it (merge_and_unload of peft), and "
            "give the folder of the merged model."
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    raise _UnreadableError(f"model {folder} has no model.safetensors and no {INDEX}. {_advice(folder)}")


def _advice(folder: Path) -> str:
    """Return how to get safetensors: transformers reads `.bin` files, which are pickles, weights-only."""
    return conversion(str(folder), f"{folder}-safetensors") if any(folder.glob("*.bin")) else "Copy the model again."


def conversion(source: str, target: str) -> str:
    """Return the command that writes a model of `.bin` files as one of safetensors, in a sentence."""
    command = shlex.join(["python", "-c", CONVERT.format(source, target)])
    return f".bin files are pickles, which are not opened here. This command converts them safely: {command}"


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        weight_map = read_json(index)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (FileError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged or not an index ({error}). Copy it again.") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file of its folder. Copy the model again.")
    return [folder / file for file in files]


def _slices(files: Sequence[Path]) -> dict[str, Slice]:
    """Return name -> lazy slice of every tensor in `files`."""
    found: dict[str, Slice] = {}
    owner: dict[str, Path] = {}
    for file in files:
        opened = _open(file)
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            if name in found:
                raise CheckpointError(f"{file} and {owner[name].name} both hold {name}. Remove the wrong one.")
            found[name], owner[name] = opened.get_slice(name), file
    return found


def _refuse_conflict(folder: Path) -> None:
    """Raise CheckpointError if the single file, which transformers reads, and the indexed files hold other tensors."""
    files = [folder / SINGLE, *_indexed(folder)]
    if len(set(files)) > 1 and not _same_tensors(str(folder), str(file_marks(files))):
        raise CheckpointError(
            f"{folder} holds both model.safetensors and {INDEX}, and their tensors differ. Remove the stale one."
        )


@cache
def _same_tensors(folder: str, marks: str) -> bool:
    """Return whether both ways of storage hold the same tensors. marks: file marks, part of the cache key only."""
    single, several = (_slices(files) for files in ([Path(folder) / SINGLE], _indexed(Path(folder))))
    return single.keys() == several.keys() and all(_equal(single[name], several[name]) for name in single)


def _equal(one: Slice, other: Slice) -> bool:
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    if len(shape) < 2:
        return torch.equal(one[:].double(), other[:].double())
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    return all(
        torch.equal(one[at : at + rows].double(), other[at : at + rows].double()) for at in range(0, shape[0], rows)
    )


def _open(file: Path) -> safe_open:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _UnreadableError(f"{file} is damaged or not a safetensors file ({error}). Copy it again.") from error


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the announced order; the library needs all tensors at once.

    Format: 8 bytes little-endian header length, a JSON header, the raw bytes (safetensors' README).
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        self._waiting = list(entries)
        self._dtype = dtype
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
        """Append the next announced tensor; any device, any strides."""
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
    """Split tensor names, in order, into files of at most `limit` bytes (at least one tensor each)."""
    files: list[list[str]] = [[]]
    room = limit
    for name, size in entries.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files
