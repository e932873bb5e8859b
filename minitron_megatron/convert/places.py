"""Places of models, as users name them -> Hugging Face folders on this machine.

A model of the Hub is downloaded by `huggingface_hub`, or taken from its cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, first_line
from ..model import is_megatron_checkpoint
from .carried import CARRIED
from .from_megatron import megatron_outline
from .weights import INDEX, SINGLE, conversion

__all__ = ["hub_folder", "is_hub_name", "local_folder"]

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
"""Owner/name, and after `@` a branch, tag or commit."""
SETTINGS = ("config.json", *CARRIED)
WEIGHTS = ("model*.safetensors", INDEX)


def is_hub_name(place: Path) -> bool:
    """Return whether a place means a model of the Hub: `owner/name[@revision]`, and no path that exists."""
    return NAME.fullmatch(str(place)) is not None and not place.exists()


def hub_folder(place: Path, *, weights: bool, commit: str | None = None) -> Path:
    """Return the folder with a model of the Hub in the local cache; its name is the commit. No code of it runs.

    weights: with its weights too, else only with its config and tokenizer. commit: instead of the place's revision.
    Raises CheckpointError where it is neither in the cache nor reachable.
    """
    found = NAME.fullmatch(str(place))
    assert found is not None, f"{place} is not a name of the Hub"
    name, revision = found.groups()
    patterns = [*SETTINGS, *(WEIGHTS if weights else ())]
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=commit or revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub and its HTTP clients raise what they like
        raise CheckpointError(
            f"{place} is not a folder here, and cannot be downloaded from the Hugging Face Hub: {first_line(error)}. "
            "Correct the path or the name, or download it where there is a network (hf download) into the cache that "
            "HF_HOME names."
        ) from error
    if weights and not any((folder / file).is_file() for file in (SINGLE, INDEX)):
        raise CheckpointError(f"{place} has no {SINGLE}. {conversion(name, name.split('/')[1])}")
    return folder


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
