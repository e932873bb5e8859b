"""Folders of a recipe's models: those that a run has brought in, else their configs and tokenizers alone."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from ..convert import local_folder
from ..errors import CheckpointError
from ..files import read_as
from ..model import is_megatron_checkpoint
from ..recipe import Recipe
from ..run_folder import RunFolder

__all__ = ["ModelOrigin", "model_origins", "with_model_folders"]


class ModelOrigin(TypedDict):
    """Origin of a model that is no Hugging Face folder of the user's, as a run records it once."""

    place: str
    """The recipe's name for it."""
    folder: str
    """Its Hugging Face folder."""
    commit: NotRequired[str]
    """Its commit on the Hub."""
    tokenizer: NotRequired[str]
    """The recipe's `tokenizer` for it."""


def model_origins(recipe: Recipe) -> dict[str, ModelOrigin]:
    """Return recipe key -> origin of each model that the recipe's run has brought in."""
    path = RunFolder(recipe.out).models
    known = read_as(path, dict[str, ModelOrigin]) if path.is_file() else {}
    places = recipe.models
    return {key: each for key, each in known.items() if key in places and _is_origin(each, places[key], recipe)}


def _is_origin(origin: ModelOrigin, place: Path, recipe: Recipe) -> bool:
    """Return whether what was brought in is what the recipe names, or is where it already was resolved to."""
    tokenizer = str(recipe.tokenizer) if recipe.tokenizer and "commit" not in origin else None
    named = (origin["place"], origin.get("tokenizer")) == (str(place), tokenizer)
    return named or origin["folder"] == str(place)


def with_model_folders(recipe: Recipe) -> Recipe:
    """Return the recipe with a Hugging Face folder in place of each model that is none.

    Before its run has brought a model in, the folder may hold only the config and the tokenizer. Raises
    CheckpointError.
    """
    origins, places = model_origins(recipe), recipe.models
    if recipe.tokenizer and not origins and not any(map(is_megatron_checkpoint, places.values())):
        raise CheckpointError(
            f"tokenizer is {recipe.tokenizer}, but no model of the recipe is a Megatron checkpoint: each has its own. "
            "Remove tokenizer."
        )
    folders = {key: _folder(place, recipe.tokenizer, origins.get(key)) for key, place in places.items()}
    return recipe.replaced(**folders, tokenizer=None)


def _folder(place: Path, tokenizer: Path | None, origin: ModelOrigin | None) -> Path:
    tokenizer = tokenizer if is_megatron_checkpoint(place) else None
    if origin is None:
        return local_folder(place, tokenizer)
    folder = Path(origin["folder"])
    return folder if folder.is_dir() else local_folder(place, tokenizer, origin.get("commit"))
