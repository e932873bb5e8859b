"""Check that transformers reads an exported folder as the same model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model import MicroBatch, Model, chunks_of, forward_only, output_weight, shape_of
from ..parallel import Topology, fail_together, gather_objects, gather_sequence
from .by_transformers import transformers_failures, transformers_model

__all__ = ["TOLERANCE", "check_folder", "logits_of"]

TOLERANCE = 1e-3
"""Allowed difference of logits, relative to the largest: fp32 rounding is far below it, a wrong weight far above."""


@torch.no_grad()
def logits_of(model: Model, batch: MicroBatch, topology: Topology) -> Tensor | None:
    """Return logits [batch, seq, vocab] in fp32 on global rank 0, None elsewhere. Collective over the world."""
    hidden, part = forward_only(model, [batch]), None
    if topology.is_last_stage and topology.dp_rank == 0:
        whole = gather_sequence(hidden[0], topology.tp_group) if topology.sequence_parallel else hidden[0]
        part = (topology.tp_rank, (whole @ output_weight(chunks_of(model)[-1]).t()).float().cpu())
    parts = sorted((each for each in gather_objects(part) if each is not None), key=lambda each: each[0])
    vocab = shape_of(chunks_of(model)[0]).vocab
    return (
        torch.cat([logits for _, logits in parts], dim=-1)[..., :vocab].transpose(0, 1) if topology.rank == 0 else None
    )


def check_folder(model: Model, folder: Path, batch: MicroBatch, topology: Topology) -> float:
    """Return the largest difference between the logits of a model in fp32 and those of transformers reading `folder`.

    batch: any tokens. Every rank returns the same. Collective over the world. Raises CheckpointError if transformers
    cannot read the folder, or if the difference exceeds TOLERANCE x the largest logit.
    """
    logits, difference = logits_of(model, batch, topology), 0.0
    with fail_together():
        if logits is not None:
            difference = _difference(logits, _by_transformers(folder, batch.tokens.cpu()), folder)
    return max(gather_objects(difference))


def _difference(logits: Tensor, reference: Tensor, folder: Path) -> float:
    """Return the largest difference from transformers' logits. Raises CheckpointError if it is too large."""
    if logits.shape != reference.shape:
        raise CheckpointError(
            f"transformers reads {folder} as another model: its logits have shape {tuple(reference.shape)}, the "
            f"exported model's {tuple(logits.shape)}. Export it again."
        )
    difference, largest = float((logits - reference).abs().max()), float(reference.abs().max())
    if not difference <= TOLERANCE * largest:
        raise CheckpointError(
            f"transformers reads {folder} as another model: logits differ by up to {difference:.3g} where the largest "
            f"is {largest:.3g}. Export it again; if that does not help, report its family as a bug."
        )
    return difference


def _by_transformers(folder: Path, tokens: Tensor) -> Tensor:
    model = transformers_model(folder, torch.float32)
    with transformers_failures("run", folder), torch.no_grad():
        logits: Tensor = model(tokens).logits.float()
    return logits
