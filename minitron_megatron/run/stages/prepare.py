"""Tokenize the corpus."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from typing_extensions import TypedDict

from ...convert import folder_hash, read_config
from ...data import chat_marks, check_tokenizer, prepare
from ...forecast import needed_tokens
from ...parallel import broadcast_object, fail_together
from ...recipe import CalibrationSource
from ..context import Context
from ..fingerprint import config_digest
from ..stage import Result, Stage

__all__ = ["PREPARE", "Source", "tokenized", "with_chat"]


class Source(TypedDict):
    tokens: int
    validation_tokens: int
    end: int
    content: str
    weight: float


class Prepared(TypedDict):
    model_hash: str
    sources: dict[str, Source]
    sequence: int
    seed: int
    cross_documents: bool
    config: str


def do_prepare(context: Context) -> Result:
    """Tokenize one corpus per source on rank 0, and record the teacher's hash."""
    recipe, result = context.recipe, None
    with fail_together():
        if context.topology.rank == 0:
            check_tokenizer(recipe.model, read_config(recipe.model).shape.vocab)
            settings: Result = {"sequence": recipe.data.sequence, "seed": recipe.seed}  # they decide later samples
            settings |= {"cross_documents": recipe.data.cross_documents, "config": config_digest(recipe.model)}
            result = {"model_hash": folder_hash(recipe.model), "sources": _prepare_sources(context), **settings}
    return broadcast_object(result)


def _prepare_sources(context: Context) -> dict[str, Source]:
    made, needed = dict[str, Source](), needed_tokens(context.recipe)
    for number, source in enumerate(context.recipe.data.sources):
        prefix, enough = context.folders.data / f"{number}-{source.name}", needed[number] if needed else None
        held_out = source.held_out_paths or float(source.validation)
        made[prefix.name] = tokenized(context, source, prefix, validation=held_out, enough=enough)
    return made


def tokenized(
    context: Context,
    source: CalibrationSource,
    prefix: Path,
    *,
    validation: float | Sequence[str],
    enough: Mapping[str, int] | None,
) -> Source:
    """Tokenize one source to `prefix`; the other arguments are those of `data.prepare`. Not collective."""
    recipe = context.recipe
    prepared = prepare(
        source.paths,
        recipe.model,
        prefix,
        validation=validation,
        workers=recipe.data.workers,
        text_key=recipe.data.text_key,
        separator=recipe.data.separator,
        seed=recipe.seed,
        vocab=read_config(recipe.model).shape.vocab,
        chat=source.chat,
        enough=enough,
        listener=context.listener,
    )
    if prepared.read < 1:
        warnings.warn(
            f"{prefix.name}: {prepared.read:.2%} of the text is tokenized, enough for the budgets.", stacklevel=3
        )
    return {
        "tokens": prepared.train.tokens,
        "validation_tokens": prepared.valid.tokens if prepared.valid else 0,
        "end": prepared.end,
        "content": prepared.content,
        "weight": source.weight,
    }


def with_chat(model: Path, sources: Sequence[CalibrationSource], inputs: object) -> object:
    """Return a stage's further inputs, with the model's chat template where a source holds chats."""
    return [inputs, chat_marks(model)] if any(source.chat for source in sources) else inputs


PREPARE = Stage(
    "prepare",
    do_prepare,
    result=Prepared,
    makes=lambda run: run.data,
    reads=("model", "data", "seed"),
    extra_inputs=lambda recipe: with_chat(recipe.model, recipe.data.sources, needed_tokens(recipe)),
    keeps=lambda run, mark: run.unfinished(run.data),
)
