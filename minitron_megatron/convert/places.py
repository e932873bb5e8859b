"""Places of models, as users name them -> Hugging Face folders on this machine."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..model import is_megatron_checkpoint
from .from_megatron import megatron_outline
from .hub import hub_folder, is_hub_name

__all__ = ["local_folder"]


def local_folder(place: Path, tokenizer: Path | None = None, commit: str | None = None) -> Path:
    """Return a Hugging Face folder that has the config and the tokenizer of a model, and of a folder here its weights.

    place: a Hugging Face folder, `owner/name[@revision]` of the Hub, or a Megatron checkpoint, with its tokenizer.
    commit: of a model of the Hub, instead of its revision. Raises CheckpointError.
    """
    if is_megatron_checkpoint(place):
        return megatron_outline(place, tokenizer)
    if tokenizer is not None:
        raise CheckpointError(
            f"tokenizer is {tokenizer}, but {place} is not a Megatron checkpoint: its own is used. Remove tokenizer."
        )
    return hub_folder(place, weights=False, commit=commit) if is_hub_name(place) else place
