"""Weights of a Megatron-Core distributed checkpoint (`torch_dist`), parameter by parameter.

Neither mcore nor torch.distributed opens it: they would unpickle, and so run, objects. Only tensors are read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_text
from ..layout import expert_of, layer_of, lookup
from .config import ModelConfig
from .megatron_arguments import config_of_arguments
from .megatron_lm import RELEASE, TRACKER
from .metadata import check_backend, read_common, read_index
from .writing import cause_of

__all__ = ["MegatronCheckpoint", "is_megatron_checkpoint"]

INDEX = ".metadata"
"""torch's index of a distributed checkpoint."""
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norm -> the prefix under which a spec stores it that fuses it with the linear layer behind it."""
MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")
"""Prefixes of a model's parameters; others belong to the optimizer."""


def is_megatron_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a Megatron checkpoint: the folder of one iteration, or the one with all of them."""
    return (folder / INDEX).is_file() or (folder / TRACKER).is_file()


class MegatronCheckpoint:
    """A Megatron checkpoint's arguments, and its parameters by their global name.

    Raises CheckpointError or FileError, which name the file, where it is damaged or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _iteration(folder)
        check_backend(self.folder)
        index = read_index(self.folder / INDEX)
        try:
            self._tensors = {key: each for key, each in index.state_dict_metadata.items() if hasattr(each, "chunks")}
            self._places = {(at.fqn, tuple(at.offset or ())): place for at, place in index.storage_data.items()}
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.folder / INDEX} is not the index of a checkpoint: {error}.") from error

    @cached_property
    def arguments(self) -> Mapping[str, Any]:
        """Megatron-LM's arguments; those that are neither numbers, text nor dtypes are stand-ins."""
        found = read_common(self.folder / "common.pt").get("args")
        if found is None:
            raise CheckpointError(
                f"{self.folder} has no arguments of Megatron-LM, so that its model is not known. Save it with "
                "Megatron-LM."
            )
        return vars(found)

    @property
    def tokenizer(self) -> Path | None:
        """The Hugging Face folder of the tokenizer that the arguments name, if it is on this machine."""
        named = self.arguments.get("tokenizer_model")
        return Path(named) if isinstance(named, str) and Path(named).is_dir() else None

    def config(self, vocab: int | None = None) -> ModelConfig:
        """Return the model's config; vocab: entries of its tokenizer. Raises CheckpointError."""
        try:
            return config_of_arguments(self.arguments, vocab)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless the checkpoint holds exactly the parameters of a config, in their shapes."""
        sizes, used, stacks = config.shape.sizes(padded=False), set(), dict[str, tuple[int, ...]]()
        for name in config.shape.names():
            key, at = self._find(name)
            used |= {each for each, _ in _keys(name)}
            stacks[key] = tuple(index + 1 for index in at)  # of the last layer and expert
            wanted, found = lookup(name).shape(sizes), tuple(self._tensors[key].size)[len(at) :]
            padded = lookup(name).tp == "vocab" and found[0] >= wanted[0]
            if len(found) != len(wanted) or (found[0] != wanted[0] and not padded) or found[1:] != wanted[1:]:
                raise CheckpointError(f"{self.folder}: {key} has shape {found}, but its arguments make it {wanted}.")
        for key, counts in stacks.items():
            if (found := tuple(self._tensors[key].size)[: len(counts)]) != counts:
                raise CheckpointError(
                    f"{self.folder}: {key} stacks {found} layers and experts, but its arguments make it {counts}."
                )
        if surplus := sorted(key for key in self._tensors if key.startswith(MODEL) and key not in used):
            raise CheckpointError(
                f"{self.folder} holds a parameter that its arguments do not describe: {surplus[0]}. Copy the "
                "checkpoint again, or give one of a model that the arguments describe."
            )

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter."""
        found: torch.dtype = self._tensors[self._find(name)[0]].properties.dtype
        return found

    def read(self, name: str) -> Tensor:
        """Return a whole parameter, in its dtype; an embedding with the padding that it was saved with."""
        key, at = self._find(name)
        stored = self._tensors[key]
        full = torch.empty(tuple(stored.size)[len(at) :], dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = tuple(index - first for index, first in zip(at, offsets, strict=False))
            if all(0 <= index < size for index, size in zip(inside, sizes, strict=False)):
                part = self._chunk(key, offsets, sizes)[inside]
                full[_slices(offsets[len(at) :], sizes[len(at) :])] = part
                filled += part.numel()
        if filled != full.numel():
            raise CheckpointError(
                f"{self.folder} holds {filled} of the {full.numel()} values of {name}. Copy it again."
            )
        return full

    def _find(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return (key, leading indices) of a parameter."""
        for key, at in _keys(name):
            if key in self._tensors:
                return key, at
        raise CheckpointError(
            f"{self.folder} lacks the parameter {name}, which its arguments ask for. Copy the checkpoint again."
        )

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        place = self._places.get((key, offsets))
        name = getattr(place, "relative_path", "")
        if place is None or Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder}: the index has no plain place for {key} at {offsets}. Copy it again.")
        file = self.folder / name
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                content = io.BytesIO(stream.read(place.length))
            tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
            return tensor.reshape(sizes)
        except Exception as error:  # a damaged file may make torch raise anything
            raise CheckpointError(f"{file} is damaged or not safe to open: {cause_of(error)}.") from error


def _iteration(folder: Path) -> Path:
    """Return the folder of the iteration that a checkpoint's tracker names."""
    if (folder / INDEX).is_file():
        return folder
    named = read_text(folder / TRACKER).strip()
    if named != RELEASE and not named.isdecimal():
        raise CheckpointError(f"{folder / TRACKER} names no iteration: {named[:20]!r}. Give the folder of one.")
    iteration = folder / (named if named == RELEASE else f"iter_{int(named):07}")
    if not iteration.is_dir():
        raise CheckpointError(f"{folder / TRACKER} names {iteration.name}, which is not there. Copy it again.")
    if not (iteration / INDEX).is_file():
        raise CheckpointError(
            f"{iteration} is not a distributed checkpoint. Convert it with Megatron-LM: "
            "--ckpt-convert-format torch_dist."
        )
    return iteration


def _keys(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the keys that mcore may store a parameter under, with its place in that tensor's leading dims.

    mcore stacks equal layers, and always the experts of a layer, in one tensor.
    """
    layer, expert = layer_of(name), expert_of(name)
    experts = () if expert is None else (expert,)
    plain = re.sub(r"local_experts\.\d+\.", "experts.", name)
    fused = [plain.replace(norm, prefix) for norm, prefix in FUSED_NORMS.items() if norm in plain]
    for key in (plain, *fused):
        yield key, experts
        if layer is not None:
            yield re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", key), (layer, *experts)


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
