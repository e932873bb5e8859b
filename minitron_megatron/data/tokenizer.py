"""The tokenizer of a Hugging Face folder, and what of it a corpus and a model must agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import DataError
from ..files import checksum, read_json

__all__ = [
    "check_tokenizer",
    "corpus_marks",
    "end_of_document",
    "load_tokenizer",
    "settings_without_chat",
    "transformers_tokenizer",
    "vocabulary",
]

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What a tokenizer is made of: the first alone, where it is there."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder, without truncation and padding. DataError where there is none that can be read."""
    folder = Path(folder)
    try:
        tokenizer = _from_json(folder) if (folder / "tokenizer.json").is_file() else _from_transformers(folder)
    except Exception as error:  # tokenizers and transformers raise anything, bare Exception included
        raise DataError(
            f"{folder} holds no tokenizer that can be read: {_first_line(error)}. "
            "Name the Hugging Face folder that holds the model's tokenizer.json."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_json(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _from_transformers(folder: Path) -> Tokenizer:
    """For folders with sentencepiece or vocab/merges files alone."""
    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


def transformers_tokenizer(folder: str | Path) -> Any:
    """The tokenizer as transformers has it, with what it puts before a text and its chat template. Raises DataError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises anything
        raise DataError(f"transformers cannot read the tokenizer in {folder}: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def vocabulary(tokenizer: Tokenizer) -> int:
    """One more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_tokenizer(folder: str | Path, vocab: int) -> None:
    """Raises DataError where the tokenizer has ids that a model of `vocab` entries has no embedding for."""
    entries = vocabulary(load_tokenizer(folder))
    if entries > vocab:
        raise DataError(
            f"The tokenizer in {folder} has {entries} entries and does not match the model's vocabulary of {vocab}. "
            "Use the tokenizer that came with the model."
        )


def end_of_document(folder: str | Path, tokenizer: Tokenizer) -> int:
    """The id that ends a document: the `eos_token` of the tokenizer's settings, else the model's `eos_token_id`."""
    token = _setting(folder, "tokenizer_config.json", "eos_token")
    if isinstance(token, dict):
        token = token["content"]
    if token is not None and (named := tokenizer.token_to_id(token)) is not None:
        return named
    for file in ("generation_config.json", "config.json"):
        number = _setting(folder, file, "eos_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int) and 0 <= number < vocabulary(tokenizer):
            return number
    raise DataError(
        f"The tokenizer in {folder} names no token that ends a document. "
        "Set eos_token in its tokenizer_config.json to one of its entries."
    )


def corpus_marks(folder: str | Path) -> list[Any]:
    """Return what decides the tokens of a corpus: the contents of the tokenizer's files, and the token that ends a
    document. Chat templates and the other settings decide none. Raises DataError where there is no tokenizer."""
    folder = Path(folder)
    alone = (folder / "tokenizer.json").is_file()
    paths = [folder / name for name in (TOKENIZER[:1] if alone else TOKENIZER) if (folder / name).is_file()]
    settings = None if alone else settings_without_chat(folder)
    return [*map(checksum, paths), settings, end_of_document(folder, load_tokenizer(folder))]


def settings_without_chat(folder: Path) -> Any:
    """Return a tokenizer's settings but for its chat template; None where it has none."""
    path = folder / "tokenizer_config.json"
    told = read_json(path) if path.is_file() else None
    return {key: value for key, value in told.items() if key != "chat_template"} if isinstance(told, dict) else told


def _setting(folder: str | Path, file: str, key: str) -> Any:
    path = Path(folder) / file
    return read_json(path).get(key) if path.is_file() else None
