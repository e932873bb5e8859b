"""Does transformers read a folder as the model that it was written from?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model import MicroBatch, chunks_of, config_of, forward_only, output_weight
from ..parallel import Topology, fail_together, gather_objects, gather_sequence
from .by_transformers import transformers_failures, transformers_model

__all__ = ["TOLERANCE", "check_folder", "logits_of"]

TOLERANCE = 1e-3
"""Of the largest logit: two orders of addition in fp32 are far below it, and a wrong weight far above."""


@torch.no_grad()
def logits_of(model: Any, batch: MicroBatch, topology: Topology) -> Tensor | None:
    """[batch, seq, vocab] in fp32 on global rank 0, None elsewhere. Collective over the world."""
    hidden, part = forward_only(model, [batch]), None
    if topology.is_last_stage and topology.dp_rank == 0:
        whole = gather_sequence(hidden[0], topology.tp_group) if topology.sequence_parallel else hidden[0]
        part = (topology.tp_rank, (whole @ output_weight(chunks_of(model)[-1]).t()).float().cpu())
    parts = sorted((each for each in gather_objects(part) if each is not None), key=lambda each: each[0])
    vocab = config_of(chunks_of(model)[0]).shape.vocab
    return (
        torch.cat([logits for _, logits in parts], dim=-1)[..., :vocab].transpose(0, 1) if topology.rank == 0 else None
    )


def check_folder(model: Any, folder: Path, batch: MicroBatch, topology: Topology) -> float:
    """The largest difference between the logits of a model in fp32 and those of transformers reading `folder`.

    batch: any tokens. Returns the same on every rank. Collective over the world. Raises CheckpointError where
    transformers cannot read the folder, or the difference exceeds TOLERANCE x the largest logit.
    """
    mine, apart = logits_of(model, batch, topology), 0.0
    with fail_together():
        if mine is not None:
            apart = _apart(mine, _by_transformers(folder, batch.tokens.cpu()), folder)
    return max(gather_objects(apart))


def _apart(mine: Tensor, theirs: Tensor, folder: Path) -> float:
    """Return the largest difference of two models' logits. Raises CheckpointError where it is too large."""
    if mine.shape != theirs.shape:
        raise CheckpointError(
            f"transformers reads {folder} otherwise: its logits have shape {tuple(theirs.shape)}, and the model's "
            f"{tuple(mine.shape)}. Export it again."
        )
    apart, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
    if not apart <= TOLERANCE * largest:
        raise CheckpointError(
            f"transformers reads {folder} otherwise: logits differ by up to {apart:.3g} where the largest is "
            f"{largest:.3g}. Export it again; if that does not help, its family needs a test in tests/convert."
        )
    return apart


def _by_transformers(folder: Path, tokens: Tensor) -> Tensor:
    model = transformers_model(folder, torch.float32)
    with transformers_failures("run", folder), torch.no_grad():
        logits: Tensor = model(tokens).logits.float()
    return logits
