"""Shards -> Hugging Face folder: one rank writes, one parameter at a time; and folders without weights (outlines)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, MinitronError
from ..events import Event, Listener, silent
from ..files import whole_folder, write_json
from ..layout import lookup
from ..model import Model, ModelConfig, chunks_of, config_of, named_shards, owner_rank
from ..parallel import Topology, fail_together, move
from .carried import carry
from .families import family_of
from .flat import Architecture, check_expressed, exported_config, flat_config, with_family
from .weights import INDEX, SafetensorsWriter, split_files

__all__ = ["full_tensors", "hf_tensors", "save_hf", "temporary_outline", "write_outline", "write_tensors"]

FILE_BYTES = 5 * 10**9

_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Temporary folders, removed when the process ends."""


def save_hf(
    model: Model,
    folder: str | Path,
    topology: Topology,
    *,
    dtype: torch.dtype | None = None,
    files_from: str | Path | None = None,
    architecture: Architecture = "own",
    file_bytes: int = FILE_BYTES,
    listener: Listener = silent,
) -> None:
    """Write a model as a Hugging Face folder, whole or not at all. Collective over the world.

    dtype: dtype of the written tensors; None: the model's. files_from: folder whose tokenizer and generation settings
    are copied. architecture: `auto` may write another family that computes the same (`exported_config`). file_bytes:
    largest size of a weights file. Memory beyond the model: one tensor.
    Raises CheckpointError on every rank if the folder cannot be written.
    """
    folder, config = Path(folder), exported_config(with_family(config_of(chunks_of(model)[0])), architecture)
    check_expressed(config)
    dtype = dtype or next(chunks_of(model)[0].parameters()).dtype
    stream = full_tensors(model, topology, dtype)
    with fail_together():
        try:
            if topology.rank == 0:
                with whole_folder(folder) as partial:
                    write_outline(partial, config, dtype, files_from)
                    write_tensors(stream, partial, config, dtype, file_bytes, listener)
        except MinitronError:
            _drain(stream)  # the other ranks still send
            raise
        except OSError as error:
            _drain(stream)
            raise CheckpointError(f"{folder} cannot be written: {error}. Make room, or give another folder.") from error
        _drain(stream)


def write_outline(folder: Path, config: ModelConfig, dtype: torch.dtype, files_from: str | Path | None) -> None:
    """Write `config.json`, and the tokenizer and generation settings of a folder, into an empty folder."""
    write_json(folder / "config.json", flat_config(config, str(dtype).removeprefix("torch.")))
    if files_from is not None:
        carry(Path(files_from), folder)


def temporary_outline(config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> Path:
    """Write an outline into a temporary folder, which lasts as long as the process."""
    _kept.append(tempfile.TemporaryDirectory(prefix="minitron-"))
    folder = Path(_kept[-1].name)
    write_outline(folder, config, dtype, tokenizer)
    return folder


def _drain(stream: Iterator[object]) -> None:
    for _ in stream:
        pass


def write_tensors(
    stream: Iterator[tuple[str, Tensor]],
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    file_bytes: int,
    listener: Listener,
) -> None:
    """Write Hugging Face tensors, which `stream` yields in the order of the layers, and an index for several files."""
    family = family_of(config.source)
    zeros = dict(family.zero_tensors(config.shape))
    shapes = dict(family.tensors(config.shape)) | zeros
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    files = split_files(sizes, file_bytes)
    weight_map = {}
    with ExitStack() as stack:
        done = 0
        for number, names in enumerate(files, 1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            writer = stack.enter_context(SafetensorsWriter(folder / file, [(n, shapes[n]) for n in names], dtype))
            for name in names:
                got, tensor = (name, torch.zeros(zeros[name], dtype=dtype)) if name in zeros else next(stream)
                assert got == name
                writer.add(name, tensor)
                del tensor  # free it before the next one is gathered
                weight_map[name] = file
                done += 1
                listener(Event("export", done, len(shapes), "tensors"))
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def full_tensors(model: Model, topology: Topology, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor of a model on global rank 0, in layer order; other ranks only take part.

    Collective over the world: every rank must run the iterator to its end. Vocabulary padding is cut off.
    """
    config = with_family(config_of(chunks_of(model)[0]))
    local_shards = {shard.name: shard for shard in named_shards(model) if not shard.tied_copy}
    for name in config.shape.names():
        local = local_shards[name].tensor.detach().to(dtype) if name in local_shards else None
        full = _gather(local, name, config, topology, dtype)
        if full is None:
            continue
        local = None
        yield from hf_tensors(name, full, config)
        del full  # free it before the next one is gathered


def hf_tensors(name: str, full: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a whole parameter. Vocabulary padding is cut off."""
    tensors = family_of(config.source).rows(name, config.shape.sizes())
    for hf, parts in tensors.items():
        if len(tensors) == len(parts) == 1:  # a whole parameter: no copy
            yield hf, full[: lookup(name).shape(config.shape.sizes(padded=False))[0]]
        else:
            yield hf, full.index_select(0, torch.cat(parts).to(full.device))


def _gather(
    local: Tensor | None, name: str, config: ModelConfig, topology: Topology, dtype: torch.dtype
) -> Tensor | None:
    """Return the unsharded parameter on global rank 0, None elsewhere; only the first replica sends."""
    param, sizes = lookup(name), config.shape.sizes()
    sources = [owner_rank(name, config.shape, topology, tp_rank, replica=0) for tp_rank in range(topology.tp)]
    writer = topology.rank == 0
    if param.tp is None or topology.tp == 1:
        return move(local, param.shape(sizes), dtype, topology.device, source=sources[0])
    full = torch.empty(param.shape(sizes), dtype=dtype, device=topology.device) if writer else None
    assert param.tp_dim is not None
    for tp_rank, source in enumerate(sources):
        rows = param.shard_rows(param.tp_dim, sizes, tp_rank, topology.tp)
        shape = list(param.shape(sizes))
        shape[param.tp_dim] = len(rows)
        view = full[int(rows[0]) : int(rows[-1]) + 1] if full is not None and param.tp_dim == 0 else None
        into = view if view is not None and len(view) == len(rows) else None  # contiguous rows: receive in place
        part = move(local, tuple(shape), dtype, topology.device, source=source, into=into)
        if full is not None and part is not None and part is not into:
            full.index_copy_(param.tp_dim, rows.to(full.device), part)
    return full
