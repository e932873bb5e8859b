"""Keys of the data that a run reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ..data import HELD_OUT_SHARE, SEPARATOR, TEXT_KEY, LossOn, Sources
from ..settings import (
    AddedLater,
    Count,
    Field,
    HowToRun,
    Positive,
    Settings,
    Text,
    model_validator,
)
from .keys import HeldOut

__all__ = ["CalibrationSource", "Data", "Source"]


class CalibrationSource(Settings):
    """One source of a blend of text and chats."""

    path: Sources
    """File, folder, glob, or a list of them: .jsonl, .json, .txt (also .gz, .zst), .parquet, .arrow; or the prefix of a
    tokenized .bin/.idx pair, used in place; or hf://owner/name[:split], a data set of the Hugging Face Hub."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""
    format: AddedLater[Literal["text", "chat"]] = "text"
    """Content of a record: `text` under `data.text_key`; or a `chat`, a conversation under `messages` (and `tools`), or
    `prompt` and `response`, which goes through the tokenizer's chat template."""
    loss_on: AddedLater[LossOn | None] = None
    """Tokens of a chat that are trained on: those of the `assistant` (the default), or `all`. Only for chats."""

    @model_validator(mode="after")
    def _text_has_no_assistant(self) -> Self:
        if self.format == "text" and self.loss_on:
            raise ValueError("loss_on is for chats: set format to chat, or remove loss_on")
        return self

    @property
    def chat(self) -> LossOn | None:
        """Tokens of a chat that are trained on; None for text."""
        return (self.loss_on or "assistant") if self.format == "chat" else None

    @property
    def paths(self) -> tuple[str, ...]:
        """All places of this source's text."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """Name of the source for people and in files: that of its first file or folder."""
        return re.sub("[*?:]+", "_", Path(self.paths[0]).stem)


class Source(CalibrationSource):
    """One source of the data blend."""

    validation: HeldOut = HELD_OUT_SHARE
    """Path of held-out files, or the share of documents to hold out (between 0 and 1)."""

    @property
    def held_out_paths(self) -> tuple[str, ...]:
        """Places of held-out text, if a share of the documents is not held out instead."""
        return (self.validation,) if isinstance(self.validation, str) else ()


class Data(Settings):
    """Training corpus of distillation, teacher correction and calibration."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources to blend by weight."""
    sequence: Count = 8192
    """Tokens per sample."""
    text_key: Text = TEXT_KEY
    """Key of a JSON object, or column of a table, that holds the text."""
    repeat: HowToRun[bool] = False
    """Repeat a source, shuffled differently each time, if a budget needs more samples than it has. If false, too few
    samples are an error."""
    cross_documents: bool = True
    """Let tokens attend to earlier documents packed into the same sample, as in Megatron's pretraining. If false,
    attention stays within a document, and the token after a document's end is not a training target. Default: true, but
    false where a source holds chats."""
    beyond_positions: bool = False
    """Allow samples longer than the model's `max_position_embeddings` or sliding window, on which it was not trained.
    If false, they are an error."""
    separator: Text = SEPARATOR
    """Text that separates the documents of a .txt file."""
    tokenize: AddedLater[Literal["all", "needed"]] = "all"
    """How much of each source is tokenized: `all`, or as much from its beginning as is `needed` by the budgets and for
    `evaluate.samples` of held-out text. A larger budget goes on from there."""
    workers: HowToRun[Annotated[Count, Field(le=1024)]] = 1
    """Processes used for tokenization."""

    @model_validator(mode="before")
    @classmethod
    def _chats_are_separate(cls, keys: Any) -> Any:
        """Set the default of `cross_documents` to false where a source holds chats."""
        sources = keys.get("sources") if isinstance(keys, dict) and "cross_documents" not in keys else ()
        listed = sources if isinstance(sources, list | tuple) else ()
        formats = [each.get("format") if isinstance(each, dict) else getattr(each, "format", None) for each in listed]
        return {**keys, "cross_documents": False} if "chat" in formats else keys
