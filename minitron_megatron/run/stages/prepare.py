"""Tokenize the corpus."""

from __future__ import annotations

import warnings

from typing_extensions import TypedDict

from ...convert import folder_hash, read_config
from ...data import check_tokenizer, prepare
from ...forecast import needed_tokens
from ...parallel import broadcast_object, fail_together
from ..context import Context
from ..fingerprint import config_digest
from ..stage import Result, Stage

__all__ = ["PREPARE"]


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
            vocab = read_config(recipe.model).shape.vocab
            check_tokenizer(recipe.model, vocab)
            settings: Result = {"sequence": recipe.data.sequence, "seed": recipe.seed}  # they decide later samples
            settings |= {"cross_documents": recipe.data.cross_documents, "config": config_digest(recipe.model)}
            result = {"model_hash": folder_hash(recipe.model), "sources": _prepare_sources(context, vocab), **settings}
    return broadcast_object(result)


def _prepare_sources(context: Context, vocab: int) -> Result:
    data, sources = context.recipe.data, {}
    needed = needed_tokens(context.recipe)
    for number, source in enumerate(data.sources):
        name = f"{number}-{source.name}"
        held_out = source.held_out_paths or source.validation
        prepared = prepare(
            source.paths,
            context.recipe.model,
            context.folders.data / name,
            validation=held_out,
            workers=data.workers,
            text_key=data.text_key,
            separator=data.separator,
            seed=context.recipe.seed,
            vocab=vocab,
            enough=needed[number] if needed else None,
            listener=context.listener,
        )
        if prepared.read < 1:
            warnings.warn(
                f"{name}: {prepared.read:.2%} of the text is tokenized, enough for the budgets.", stacklevel=3
            )
        validation_tokens = prepared.valid.tokens if prepared.valid else 0
        tokens = {"tokens": prepared.train.tokens, "validation_tokens": validation_tokens}
        sources[name] = {**tokens, "end": prepared.end, "content": prepared.content, "weight": source.weight}
    return sources


PREPARE = Stage(
    "prepare",
    do_prepare,
    result=Prepared,
    makes=lambda run: run.data,
    reads=("model", "data", "seed"),
    extra_inputs=needed_tokens,
    keeps=lambda run, mark: run.unfinished_corpus,
)
