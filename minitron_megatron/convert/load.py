"""Hugging Face safetensors -> this rank's shards; each rank reads only its own slices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, did_you_mean
from ..events import Event, Listener, silent
from ..layout import lookup, words
from ..model import Chunk, ModelConfig, Recompute, Spec, assign, build, named_shards
from ..parallel import Topology, fail_together
from .config import read_config, tied_names
from .families import family_of
from .family import Family
from .weights import Weights

__all__ = ["check_weights", "load_hf"]

IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers in old exports; here they are computed."""
AXIS_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "kv_group": ("num_attention_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
}
"""Word of the layout table -> config keys of its size, if they are the same in all families."""


def load_hf(
    folder: str | Path,
    topology: Topology,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: Recompute = "none",
    spec: Spec = "local",
    listener: Listener = silent,
) -> list[Chunk]:
    """Load a Hugging Face folder as this rank's chunks of an mcore GPTModel, with parameters of `dtype`.

    recompute: activations to recompute in the backward pass. spec: `local` layers or Transformer Engine's (`te`).
    Collective over the world only to fail together. Raises CheckpointError that names a missing, surplus or misshapen
    tensor, TopologyError if the shape does not fit the layout, and RecipeError if the spec's layers are not installed.
    """
    folder = Path(folder)
    with fail_together():
        config, weights = open_weights(folder)
        check_tensors(weights, config, family_of(config.source))
        chunks = build(config, topology, dtype, recompute=recompute, spec=spec)
    shards = list(named_shards(chunks))
    for done, shard in enumerate(shards, 1):
        tensor = read_shard(weights, shard.name, config, topology)
        assign(shard, tensor.to(topology.device, dtype))
        listener(Event("import", done, len(shards), "tensors"))
    return chunks


def open_weights(folder: Path) -> tuple[ModelConfig, Weights]:
    """Return the config of a folder and its tensors.

    If embeddings are tied and only the output layer is stored, it is renamed to the embedding. Raises CheckpointError
    as `read_config` does, and if the weights cannot be read.
    """
    config, weights = read_config(folder), Weights(folder)
    if config.shape.tied:
        embedding, head = tied_names(config)
        if embedding not in weights and head in weights:
            weights.rename(head, embedding)
    return config, weights


def check_weights(folder: Path) -> None:
    """Raise CheckpointError if a folder's weights are missing or do not fit its config. Reads only headers."""
    config, weights = open_weights(folder)
    check_tensors(weights, config, family_of(config.source))


def check_tensors(weights: Weights, config: ModelConfig, family: Family) -> None:
    """Raise CheckpointError unless the files hold exactly this model's tensors, and all biases of `Family.zeros` are
    zero."""
    sizes, expected = config.shape.sizes(padded=False), set()
    for name in config.shape.names():
        for hf, shape in (*family.shapes(name, sizes), *family.zeros_of(name, sizes)):
            expected.add(hf)
            if hf not in weights:
                patterns = {pattern for roles in (*family.names.values(), family.zeros) for pattern in roles.values()}
                near = did_you_mean(hf, [stored for stored in weights.names() if _pattern(stored) not in patterns])
                raise CheckpointError(f"{weights.folder} lacks the tensor {hf}.{near}{_reason(hf, config, family)}")
            if weights.shape(hf) != shape:
                raise CheckpointError(
                    f"{weights.folder}: {hf} has shape {weights.shape(hf)}, but config.json makes it {shape}. "
                    f"Check its {', '.join(_keys(name, family))}."
                )
    tied_copy = {"lm_head.weight"} if config.shape.tied else set()
    for hf in weights.names():
        if hf not in expected | tied_copy and not hf.endswith(IGNORED):
            raise CheckpointError(
                f"{weights.folder} holds a tensor that the model does not have: {hf}.{_reason(hf, config, family)}"
            )
    _check_zeros(weights, config, family)


def _check_zeros(weights: Weights, config: ModelConfig, family: Family) -> None:
    for hf, _ in family.zero_tensors(config.shape):
        if weights.read(hf).any():
            raise CheckpointError(
                f"{weights.folder}: {hf} is not zero, but this bias is not supported. "
                f"Only a {family.model_type} whose {hf.split('.', 3)[-1]} is zero in every layer can be loaded."
            )


def _pattern(hf: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", hf)


def _keys(name: str, family: Family) -> list[str]:
    """Return the config keys that determine a parameter's shape."""
    of_family = {"expert" if field == "experts" else field: keys for field, keys in family.keys.items()}
    known = {**AXIS_KEYS, **of_family}
    return [key for dim in lookup(name).dims for word in words(dim) for key in known.get(word, ())]


def _reason(hf: str, config: ModelConfig, family: Family) -> str:
    """Return a sentence with the config keys that determine whether the model has this tensor."""
    numbers, shape = re.findall(r"\.(\d+)\.", hf), config.shape
    if hf.endswith("proj.bias") and "attention_bias" in config.source:
        return f" config.json says attention_bias: {str(config.source['attention_bias']).lower()}."
    if not numbers:
        return f" config.json says tie_word_embeddings: {str(shape.tied).lower()}." if hf == "lm_head.weight" else ""
    experts = f" and {family.keys['experts'][0]}: {shape.experts}" if shape.experts and len(numbers) > 1 else ""
    return f" config.json says num_hidden_layers: {shape.layers}{experts}."


def read_shard(weights: Weights, name: str, config: ModelConfig, topology: Topology) -> Tensor:
    """Return this rank's shard of one parameter, zero-padded, in the file's dtype (for fused tensors the widest)."""
    param, sizes = lookup(name), config.shape.sizes()
    rows = [param.shard_rows(dim, sizes, topology.tp_rank, topology.tp) for dim in range(len(param.dims))]
    tail = [_range(dim_rows) for dim_rows in rows[1:]]
    tensors = family_of(config.source).rows(name, sizes)
    dtype = reduce(torch.promote_types, map(weights.dtype, tensors))
    shard = torch.zeros([len(dim_rows) for dim_rows in rows], dtype=dtype)
    for hf, parts in tensors.items():
        start = 0
        for part_rows in parts:
            at = torch.isin(rows[0], part_rows).nonzero().flatten()
            first, last = _range(torch.searchsorted(part_rows, rows[0][at]))
            part = weights.read(hf, (start + first, min(start + last, weights.shape(hf)[0])), *tail)
            shard[at[: len(part)]] = part.to(dtype)
            start += len(part_rows)
    return shard


def _range(rows: Tensor) -> tuple[int, int]:
    """Return consecutive rows as (start, stop)."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    assert stop - start == len(rows), "a shard's slice of a Hugging Face tensor is one range"
    return start, stop
