"""Megatron checkpoint -> Hugging Face folder, one parameter at a time, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce
from pathlib import Path

import torch
from torch import Tensor

from ..data import load_tokenizer, vocabulary
from ..errors import CheckpointError
from ..events import Listener, silent
from ..files import whole_folder
from ..model import MegatronCheckpoint, ModelConfig
from .carried import carried_files
from .export import FILE_BYTES, hf_tensors, temporary_outline, write_outline, write_tensors
from .flat import with_family

__all__ = ["import_megatron", "megatron_outline"]


def import_megatron(
    checkpoint: Path, folder: Path, tokenizer: Path | None = None, *, listener: Listener = silent
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder, whole or not at all, in the dtype of its weights.

    tokenizer: Hugging Face folder with its tokenizer; None: the one that the checkpoint names, if it is there.
    Raises CheckpointError.
    """
    source, config, tokenizer = _opened(checkpoint, tokenizer)
    dtype = _dtype(source, config)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in config.shape.names():
            yield from hf_tensors(name, source.read(name).to(dtype), config)

    with whole_folder(folder) as partial:
        write_outline(partial, config, dtype, tokenizer)
        write_tensors(stream(), partial, config, dtype, FILE_BYTES, listener)


@cache
def megatron_outline(checkpoint: Path, tokenizer: Path | None = None) -> Path:
    """Return a temporary folder with the config and tokenizer that `import_megatron` would write, without weights.

    It lasts as long as the process. Raises CheckpointError.
    """
    source, config, tokenizer = _opened(checkpoint, tokenizer)
    return temporary_outline(config, _dtype(source, config), tokenizer)


def _opened(checkpoint: Path, tokenizer: Path | None) -> tuple[MegatronCheckpoint, ModelConfig, Path | None]:
    """Return a checkpoint, its config, and the folder of its tokenizer, if one is known."""
    source = MegatronCheckpoint(checkpoint)
    tokenizer = tokenizer or source.tokenizer
    if tokenizer is not None and not carried_files(tokenizer):
        raise CheckpointError(f"{tokenizer} holds no tokenizer. Give the Hugging Face folder of {checkpoint}'s own.")
    config = source.config(vocabulary(load_tokenizer(tokenizer)) if tokenizer else None)
    source.check(config)
    return source, with_family(config), tokenizer


def _dtype(source: MegatronCheckpoint, config: ModelConfig) -> torch.dtype:
    """Return the dtype that holds every parameter exactly."""
    return reduce(torch.promote_types, map(source.dtype, config.shape.names()))
