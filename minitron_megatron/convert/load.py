"""Hugging Face safetensors -> this rank's shards, each rank asking only for its own slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, did_you_mean
from ..events import Event, Listener, silent
from ..layout import lookup
from ..model import ModelConfig, Recompute, Spec, adopt, build, named_shards
from ..parallel import Topology, fail_together
from .config import read_config
from .families import family_of
from .family import Family
from .weights import Weights

__all__ = ["check_weights", "load_hf"]

IGNORED = ("rotary_emb.inv_freq",)
"""Buffers that old exports carry and that are computed here."""


def load_hf(
    folder: str | Path,
    topology: Topology,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: Recompute = "none",
    spec: Spec = "local",
    listener: Listener = silent,
) -> list[Any]:
    """A Hugging Face folder as this rank's chunks of an mcore GPTModel, with parameters of `dtype`.

    recompute: what runs again in the backward pass. spec: whose layers. Collective over the world only to fail
    together. Raises CheckpointError naming a missing, surplus or misshapen tensor, TopologyError where the shape does
    not fit the layout, and RecipeError where the layers are not there.
    """
    folder = Path(folder)
    with fail_together():
        config = read_config(folder)
        weights = Weights(folder)
        check_tensors(weights, config, family_of(config.source))
        chunks = build(config, topology, dtype, recompute=recompute, spec=spec)
    shards = list(named_shards(chunks))
    for done, shard in enumerate(shards, 1):
        tensor = read_shard(weights, shard.name, config, topology)
        adopt(shard, tensor.to(topology.device, dtype))
        listener(Event("import", done, len(shards), "tensors"))
    return chunks


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where a folder's weights are missing or not those of its config. Reads headers alone."""
    config = read_config(folder)
    check_tensors(Weights(folder), config, family_of(config.source))


def check_tensors(weights: Weights, config: ModelConfig, family: Family) -> None:
    """Raises CheckpointError where the headers do not hold exactly this model's tensors."""
    expected = dict(family.tensors(config.shape))
    for hf, shape in expected.items():
        if hf not in weights:
            near = did_you_mean(hf, [name for name in weights.names() if name not in expected])
            raise CheckpointError(f"{weights.folder} lacks the tensor {hf}.{near}")
        if weights.shape(hf) != shape:
            raise CheckpointError(
                f"{weights.folder}: {hf} has shape {weights.shape(hf)}, and config.json makes it {shape}."
            )
    for hf in weights.names():
        tied_copy = config.shape.tied and hf == "lm_head.weight"
        if hf not in expected and not tied_copy and not hf.endswith(IGNORED):
            raise CheckpointError(f"{weights.folder} holds a tensor that the model does not have: {hf}.")


def read_shard(weights: Weights, name: str, config: ModelConfig, topology: Topology) -> Tensor:
    """This rank's shard of one parameter, padding zero, in the file's dtype."""
    param, sizes = lookup(name), config.shape.sizes()
    rows = [param.shard_rows(dim, sizes, topology.tp_rank, topology.tp) for dim in range(len(param.dims))]
    tail = [_range(dim_rows) for dim_rows in rows[1:]]
    shard: Tensor | None = None
    for hf, parts in family_of(config.source).rows(name, sizes).items():
        start = 0
        for of_part in parts:
            at = torch.isin(rows[0], of_part).nonzero().flatten()
            first, last = _range(torch.searchsorted(of_part, rows[0][at]))
            part = weights.read(hf, (start + first, min(start + last, weights.shape(hf)[0])), *tail)
            if shard is None:
                shard = part.new_zeros([len(dim_rows) for dim_rows in rows])
            shard[at[: len(part)]] = part
            start += len(of_part)
    assert shard is not None
    return shard


def _range(rows: Tensor) -> tuple[int, int]:
    """Consecutive rows as [start, stop)."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    assert stop - start == len(rows), "a shard's slice of a Hugging Face tensor is one range"
    return start, stop
