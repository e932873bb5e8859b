"""Likelihoods of all responses under the frozen start of a round: measured once and stored, so that training holds no
second model. They do not depend on the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .. import numbers
from ..errors import FileError
from ..events import Event, Listener
from ..model import Model, chunks_of, evaluating, forward_only
from ..parallel import Topology, gather_objects
from .objective import response_likelihoods
from .pairs import PairFile, Reference, padded_length, pair_batch

__all__ = ["load_reference", "measure_reference"]


@torch.no_grad()
def measure_reference(
    model: Model, file: PairFile, topology: Topology, *, micro_batch: int, listener: Listener
) -> Reference:
    """Return log p of each pair's responses in nats, on every rank. Collective over the world.

    Data-parallel ranks share the pairs, longest first; pairs of similar length lie in one micro-batch.
    """
    order = np.argsort(-file.lengths, kind="stable")
    found = np.full((len(file), 2), np.nan, np.float32)
    window = micro_batch * topology.pp
    starts = range(0, len(order), window * topology.dp)
    with evaluating(model):
        for done, start in enumerate(starts, 1):
            round_of = order[start : start + window * topology.dp]
            length = padded_length(file.lengths[round_of], topology.tp if topology.sequence_parallel else 1)
            mine = [int(round_of[min(at, len(round_of) - 1)]) for at in _places(topology, window)]
            for part in gather_objects(_likelihoods(model, file, mine, length, micro_batch, topology)):
                for pair, values in part.items():
                    found[pair] = values
            listener(Event("reference", done, len(starts), "batches"))
    return found


def _places(topology: Topology, window: int) -> range:
    """Return this rank's places in a round; ranks without any repeat the last pair."""
    return range(topology.dp_rank * window, (topology.dp_rank + 1) * window)


def _likelihoods(
    model: Model, file: PairFile, pairs: list[int], length: int, micro_batch: int, topology: Topology
) -> dict[int, list[float]]:
    """Return pair -> log p of its two responses; empty before the last pipeline stage."""
    parts = [pairs[at : at + micro_batch] for at in range(0, len(pairs), micro_batch)]
    batches = [pair_batch([file[at] for at in part], length).to(topology.device) for part in parts]
    found: dict[int, list[float]] = {}
    for number, hidden in enumerate(forward_only(model, batches)):
        values = response_likelihoods(chunks_of(model)[-1], hidden, batches[number], topology)
        found |= dict(zip(parts[number], values.tolist(), strict=True))
    return found


def load_reference(path: Path, pairs: int) -> Reference:
    """Return stored likelihoods of so many pairs. Raises FileError where the file does not hold them."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        reference = load_file(path)["reference"]
    except (OSError, SafetensorError, KeyError) as error:
        raise FileError(f"{path} cannot be read: {error}. Remove it, and run the command again.") from error
    if reference.shape != (pairs, 2) or not np.isfinite(reference).all():
        held = f"the likelihoods of {numbers.counted(pairs, 'pair')}"
        raise FileError(f"{path} does not hold {held}. Remove it, and run the command again.")
    return reference
