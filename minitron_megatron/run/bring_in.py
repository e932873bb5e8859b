"""Models of the Hub and Megatron checkpoints -> Hugging Face folders, once per run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..convert import check_weights, hub_folder, import_megatron, is_hub_name
from ..events import Listener
from ..files import write_json
from ..forecast import ModelOrigin, model_origins, with_model_folders
from ..model import is_megatron_checkpoint
from ..parallel import Topology, fail_together
from ..recipe import Recipe
from ..run_folder import RunFolder

__all__ = ["bring_in"]


def bring_in(recipe: Recipe, topology: Topology, listener: Listener) -> Recipe:
    """Return the recipe with a Hugging Face folder for each model, whole; `models.json` records what they were.

    Rank 0 downloads and converts; the other ranks then find it done, or download to a cache of their own machine.
    Collective over the world. Raises CheckpointError.
    """
    elsewhere = {key: at for key, at in recipe.models.items() if is_megatron_checkpoint(at) or is_hub_name(at)}
    with fail_together():
        if elsewhere and topology.rank == 0:
            _record(recipe, elsewhere, listener)
    with fail_together():
        for key, place in elsewhere.items():
            if is_hub_name(place):
                hub_folder(place, weights=True, commit=model_origins(recipe)[key]["commit"])
        return with_model_folders(recipe)


def _record(recipe: Recipe, elsewhere: Mapping[str, Path], listener: Listener) -> None:
    """Bring the models in, and add their origins to those known; a checkpoint that was brought in may be gone since."""
    known = model_origins(recipe)
    found = {key: _origin(recipe, key, place, known.get(key), listener) for key, place in elsewhere.items()}
    if known | found != known:
        write_json(RunFolder(recipe.out).models, known | found)


def _origin(recipe: Recipe, key: str, place: Path, known: ModelOrigin | None, listener: Listener) -> ModelOrigin:
    if is_hub_name(place):
        folder = hub_folder(place, weights=True, commit=known and known.get("commit"))
        check_weights(folder)
        return {"place": str(place), "folder": str(folder), "commit": folder.name}
    folder = RunFolder(recipe.out).model(f"imported-{key}")
    if known is None or not folder.is_dir():
        import_megatron(place, folder, recipe.tokenizer, listener=listener)
    origin: ModelOrigin = {"place": str(place), "folder": str(folder)}
    return {**origin, "tokenizer": str(recipe.tokenizer)} if recipe.tokenizer else origin
