"""Hugging Face folders without weights: the config and tokenizer of a model that is not written yet."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..files import write_json
from ..model import ModelConfig
from .carried import carry
from .flat import flat_config

__all__ = ["temporary_outline", "write_outline"]

_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Temporary folders, removed when the process ends."""


def write_outline(folder: Path, config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> None:
    """Write `config.json`, and the files of a tokenizer's folder, into an empty folder."""
    write_json(folder / "config.json", flat_config(config, str(dtype).removeprefix("torch.")))
    if tokenizer is not None:
        carry(tokenizer, folder)


def temporary_outline(config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> Path:
    """Write an outline into a temporary folder, which lasts as long as the process."""
    _kept.append(tempfile.TemporaryDirectory(prefix="minitron-"))
    folder = Path(_kept[-1].name)
    write_outline(folder, config, dtype, tokenizer)
    return folder
