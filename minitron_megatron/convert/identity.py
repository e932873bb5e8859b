"""Identity of a model: a hash of its weights, independent of layout, file split and stored dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..model import Model, chunks_of
from ..parallel import Topology, broadcast_object
from .export import full_tensors
from .families import family_of
from .load import check_tensors, open_weights

__all__ = ["folder_hash", "model_hash"]


def model_hash(model: Model, topology: Topology) -> str:
    """Return SHA-256 over a model's sorted Hugging Face names, shapes and fp32 values. Collective over the world."""
    dtype = next(chunks_of(model)[0].parameters()).dtype
    lines = [_line(name, tensor) for name, tensor in full_tensors(model, topology, dtype)]
    return broadcast_object(_combine(lines))


def folder_hash(folder: Path) -> str:
    """Return the `model_hash` of the weights in a Hugging Face folder, without building the model."""
    config, weights = open_weights(folder)
    check_tensors(weights, config, family_of(config.source))
    return _combine(_line(hf, weights.read(hf)) for hf, _ in family_of(config.source).tensors(config.shape))


def _line(name: str, tensor: Tensor) -> str:
    values = tensor.to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(values.numpy().data).hexdigest()
    return f"{name} {tuple(values.shape)} {digest}\n"


def _combine(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
