"""Tokenizer of a Hugging Face folder, and the properties on which a corpus and a model must agree.

No code of the folder ever runs, and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..errors import DataError, MinitronError, first_line
from ..files import checksum, read_json
from .document import HALF_SURROGATE
from .encode import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "check_same_tokenizer",
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
"""Files that make up a tokenizer; if the first one exists, only that one counts."""

MOST_BYTES = 1 << 30
"""Size limit of a tokenizer.json; the largest known one has 40 million bytes."""
DECIDING = ("normalizer", "pre_tokenizer", "model", "added_tokens")
"""Parts of a tokenizer.json that decide the tokens of a text."""
MOST_SHOWN = 100
"""Characters of a value that a message shows."""
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder, without truncation or padding. Raises DataError where none can be read."""
    folder = Path(folder)
    with _explained(folder):
        tokenizer = _from_json(folder) if (folder / "tokenizer.json").exists() else _backend(folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not tokenizer.get_vocab_size(with_added_tokens=True):
            raise DataError(f"The tokenizer in {folder} has no entries. Use the one that came with the model.")
    return tokenizer


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn any error of tokenizers and transformers inside the block into a DataError."""
    try:
        yield
    except MinitronError:
        raise
    except BaseException as error:
        if not foreign(error):
            raise
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            raise DataError(
                f"The tokenizer in {folder} is code (auto_map in tokenizer_config.json), which is never run. "
                "Save it as a tokenizer.json, and remove auto_map."
            ) from error
        raise DataError(
            f"{folder} holds no tokenizer that can be read: {reason}. "
            "Name the Hugging Face folder that holds the model's tokenizer.json."
        ) from error


def _from_json(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{file} is not a file. Put the model's tokenizer.json there.")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise DataError(f"{file} has {size:,} bytes, too many for a tokenizer. Put the model's tokenizer.json there.")
    return Tokenizer.from_file(str(file))


def _backend(folder: Path) -> Tokenizer:
    """Return the fast tokenizer that transformers makes from sentencepiece or vocab/merges files."""
    converted = _from_transformers(folder)
    if not isinstance(getattr(converted, "backend_tokenizer", None), Tokenizer):
        raise ValueError(f"transformers has only a slow {type(converted).__name__} for it")
    return converted.backend_tokenizer


def transformers_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer, with its special tokens and chat template. Raises DataError where none can be
    read."""
    with _explained(Path(folder)):
        return _from_transformers(Path(folder))


def _from_transformers(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder")  # transformers would look the name up in its download cache
    settings, *_ = (_settings(folder, file) for file in SETTINGS)
    whole = (folder / "tokenizer.json").exists()
    if not whole and (folder / "tokenizer.model").is_file():
        _check_pieces(folder / "tokenizer.model")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain = (
        PreTrainedTokenizerFast if whole and "auto_map" in settings else AutoTokenizer
    )  # never the folder's own class
    return plain.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _check_pieces(file: Path) -> None:
    """Raise DataError where a sentencepiece model is unreadable: transformers would misreport it as a tiktoken file."""
    with file.open("rb") as stream:
        if TIKTOKEN_LINE.fullmatch(stream.readline(1000)):
            return
    try:
        import google.protobuf  # noqa: F401
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise DataError(
            f"{file} can only be read with the packages sentencepiece and protobuf: {error}. "
            "Install both (pip install sentencepiece protobuf)."
        ) from error
    try:
        SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise DataError(f"{file} is damaged or not a sentencepiece model. Copy the model's file again.") from error


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_tokenizer(folder: str | Path, vocab: int) -> None:
    """Raise DataError where the tokenizer cannot be read, or its end-of-document token is not in the model's
    vocabulary.

    Entries beyond the model's `vocab` are allowed as long as no text contains them, which `prepare` checks. A warning
    is given if any of them is not an added token, since the tokenizer may then belong to another model.
    """
    tokenizer = load_tokenizer(folder)
    if (end := end_of_document(folder, tokenizer)) >= vocab:
        raise DataError(
            f"The tokenizer in {folder} ends documents with {tokenizer.id_to_token(end)!r} ({end}), and the model has "
            f"{vocab} entries. Set eos_token in its tokenizer_config.json to a token that the model knows."
        )
    plain = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if plain > vocab:
        warnings.warn(
            f"The tokenizer in {folder} has {plain} entries, and the model has {vocab}: text with one of the other "
            "tokens is refused. Is it the tokenizer that came with the model?",
            stacklevel=1,  # always this line, so that Python shows the warning once per process
        )


def check_same_tokenizer(folder: str | Path, other: str | Path) -> int:
    """Return the number of entries that two folders' tokenizers have.

    Raises DataError, which names the first difference, where they may make different tokens of a text.
    """
    ours, theirs = load_tokenizer(folder), load_tokenizer(other)
    words = [{at: word for word, at in each.get_vocab(with_added_tokens=True).items()} for each in (ours, theirs)]
    ids = sorted(words[0].keys() | words[1].keys())
    where, values = next(
        ((f"token {at}", [each.get(at) for each in words]) for at in ids if words[0].get(at) != words[1].get(at)),
        ("", []),
    )
    if not where:
        parts = [{key: json.loads(each.to_str())[key] for key in DECIDING} for each in (ours, theirs)]
        if parts[0] == parts[1]:
            return vocabulary(ours)
        where, values = _first_difference("", *parts)
    raise DataError(
        f"The tokenizers in {folder} and {other} differ: {where} is {values[0]!r} in the first, {values[1]!r} in the "
        "second. Give models with the same tokenizer."
    )


def _first_difference(where: str, one: Any, other: Any) -> tuple[str, list[Any]]:
    """Return the place of the first difference between two JSON values that differ, and what each has there."""
    inside: Iterable[Any] = ()
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        inside = one
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        inside = range(len(one))
    for key in inside:
        if one[key] != other[key]:
            return _first_difference(f"{where}.{key}".lstrip("."), one[key], other[key])
    return where, [str(value)[:MOST_SHOWN] for value in (one, other)]


def end_of_document(folder: str | Path, tokenizer: Tokenizer) -> int:
    """Return the end-of-document token id: `eos_token` of the tokenizer's settings, else the model's `eos_token_id`.

    Raises DataError where there is none, or a setting has the wrong type.
    """
    for file, key in (
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("special_tokens_map.json", "eos_token"),
    ):
        try:
            found = _id(_settings(folder, file).get(key), tokenizer, text=key == "eos_token")
        except TypeError as error:
            where = f"{Path(folder) / file} has a wrong {key}"
            raise DataError(f"{where}: {error}. Set it to one of the tokenizer's entries.") from error
        if found is not None and (key == "eos_token" or 0 <= found < vocabulary(tokenizer)):
            return found
    raise DataError(
        f"The tokenizer in {folder} names no token that ends a document. "
        "Set eos_token in its tokenizer_config.json to one of its entries."
    )


def corpus_marks(folder: str | Path, tokenizer: Tokenizer | None = None) -> list[object]:
    """Return everything that determines the tokens of a corpus: checksums of the tokenizer's files, its settings where
    they matter, and the end-of-document token. tokenizer: that of the folder, if it is loaded already.

    A chat template does not count; with a tokenizer.json, no setting but the end-of-document token does. Raises
    DataError where there is no tokenizer.
    """
    folder = Path(folder)
    self_contained = (folder / "tokenizer.json").is_file()
    files = TOKENIZER[:1] if self_contained else TOKENIZER
    paths = [folder / name for name in files if (folder / name).is_file()]
    settings = None if self_contained else settings_without_chat(folder)
    return [*map(checksum, paths), settings, end_of_document(folder, tokenizer or load_tokenizer(folder))]


def settings_without_chat(folder: Path) -> dict[str, object] | None:
    """Return a tokenizer's settings without its chat template; None without a tokenizer_config.json."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    settings = _settings(folder, "tokenizer_config.json")
    return {key: value for key, value in settings.items() if key != "chat_template"}


def _id(value: object, tokenizer: Tokenizer, *, text: bool) -> int | None:
    """Return the token id that a setting gives; None where it gives none.

    text: the setting is a token's text, or an object with the text as `content`; otherwise an id, or a list of ids, of
    which the first counts. Raises TypeError for another type.
    """
    if isinstance(value, dict) and text:
        value = value.get("content", value)
    elif isinstance(value, list) and not text:
        value = value[0] if value else None
    if value is None:
        return None
    if text and isinstance(value, str) and not HALF_SURROGATE.search(value):
        return tokenizer.token_to_id(value)
    if text or isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"it is {str(value)[:40]!r}")
    return value


def _settings(folder: str | Path, file: str) -> dict[str, object]:
    """Return the settings in a file of a folder; empty without that file. Raises FileError or DataError if invalid."""
    path = Path(folder) / file
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise DataError(f"{path} does not hold a JSON object. Put the model's own file there.")
    return found
