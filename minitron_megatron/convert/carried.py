"""Files of a Hugging Face folder that are copied to an export: tokenizer, chat templates, generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import check_as, read_as, read_json, write_json

__all__ = ["carried_files", "carry", "stop_at"]

GENERATION = "generation_config.json"
CARRIED = (
    "tokenizer*.json",  # tokenizer.json, its settings, and versions of it (tokenizer.4.0.0.json)
    "tokenizer.model.v*",
    "*.model",  # sentencepiece and tiktoken
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "*tekken*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "vocab.bpe",
    "encoder.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "chat_template*.jinja",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
    GENERATION,
)
"""File name patterns that transformers' tokenizers and generation read. No pattern matches weights or code."""

CODE = "auto_map"


def carried_files(folder: Path) -> list[Path]:
    """Return the files in `folder` to copy to an export, sorted; links to files count as files.

    Raises CheckpointError for a broken link.
    """
    found = sorted({path for pattern in CARRIED for path in folder.glob(pattern)})
    for path in found:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a broken link. Download the file again.")
    return [path for path in found if path.is_file()]


def carry(source: Path, target: Path) -> None:
    """Copy the contents of the `carried_files` of one folder into another.

    Code is not copied, so the tokenizer config's `auto_map`, which names code files, is dropped. Raises CheckpointError
    if a file cannot be read.
    """
    for path in carried_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        try:
            content = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}. Exports need a copy of it.") from error
        with content, copy.open("wb") as into:
            shutil.copyfileobj(content, into)
        if path.name == "tokenizer_config.json":
            _drop_code(copy)


def stop_at(folder: Path, ends: Iterable[int]) -> None:
    """Add token ids to those at which generation ends, in a folder's `generation_config.json`.

    Raises FileError where that file does not hold generation settings.
    """
    path = folder / GENERATION
    settings = read_as(path, dict[str, Any]) if path.is_file() else {}
    known = check_as(settings.get("eos_token_id", []), list[int] | int | None, f"{path}: eos_token_id")  # type: ignore[arg-type]
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if missing := sorted(set(ends) - set(ids)):
        write_json(path, settings | {"eos_token_id": [*ids, *missing]})


def _drop_code(path: Path) -> None:
    settings = read_json(path)
    if isinstance(settings, dict) and settings.pop(CODE, None) is not None:
        write_json(path, settings)
