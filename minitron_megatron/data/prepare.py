"""Tokenizing text to `.bin/.idx` pairs; the result does not depend on the number of processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Tokenizer

from .. import numbers
from ..errors import DataError
from ..events import Event, Listener, silent
from ..files import file_marks
from .chat_encode import ChatEncoder, LossOn
from .document import SEPARATOR, TEXT_KEY, Document, Fields
from .encode import EncodeError, Encoder, encode_all
from .hub import every_file
from .in_place import use_pair
from .readers import documents
from .sources import HUB, left_out, names, pair_prefix
from .template import load_template
from .token_files import SPLITS, Prepared, PreparedSplit, content_of
from .token_writer import PairWriters, TokenFileWriter, pair_writers, token_dtype
from .tokenizer import corpus_marks, end_of_document, load_tokenizer, vocabulary

__all__ = ["HELD_OUT_SHARE", "prepare"]

HELD_OUT_SHARE = 0.01
"""Share of the documents that is held out by default."""

BATCH_CHARS = 1 << 18
"""Characters of text sent to a worker process at a time."""
MOST_LEFT = 20
"""Maximum number of files that a warning lists for one reason."""


class Position(NamedTuple):
    """Place in the list of files, right after a document."""

    file: int = 0
    """Index of the file."""
    inside: int = 0
    """Number of documents of the file that come before."""
    number: int = 0
    """Number of all documents that come before."""
    source_bytes: int = 0
    replaced: int = 0
    """Number of unpaired surrogates that were replaced."""
    first: str = ""
    """Place of the first of them."""


class Item(NamedTuple):
    split: str
    document: Document
    after: Position


def prepare(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out_prefix: str | Path,
    *,
    validation: float | Sequence[str | Path] = HELD_OUT_SHARE,
    workers: int = 1,
    text_key: str = TEXT_KEY,
    separator: str = SEPARATOR,
    seed: int = 0,
    vocab: int | None = None,
    chat: LossOn | None = None,
    enough: Mapping[str, int] | None = None,
    listener: Listener = silent,
) -> Prepared:
    """Tokenize the text of `sources`: files, folders, globs, and data sets of the Hub (`hf://owner/name:split`).

    A source that names a tokenized `.bin/.idx` pair is used in place (`use_pair`), and must be the only one.
    `text_key` is the key or column of the text in `.jsonl`, `.json`, `.parquet` and `.arrow` files; `separator` parts
    the documents of `.txt` files.

    `chat` says that records are conversations, and which tokens are trained on: the assistant's, or all. A pair
    `<out_prefix>.<split>.mask` then holds a mark for each token.

    Writes `<out_prefix>.train.bin/.idx` and `<out_prefix>.valid.bin/.idx`. `validation` is the fraction of documents
    to hold out, drawn by `seed` (0: no validation split), or the sources to hold out. `tokenizer` is a Hugging Face
    folder; each text ends with its end-of-sequence token and gets no other special token. `vocab` is the number of
    entries of the model's embedding. `enough` are the tokens of the splits `train` and `valid` after which to stop; a
    later call with more goes on from there. So does one after a kill. Not collective: call it in one process.

    Warns of files in folders that are skipped as they hold no data, and of unpaired surrogates, which become U+FFFD.
    Raises DataError where a source or the tokenizer cannot be read, where a document has a token that the model does
    not have, or where a split would be empty; FileError where files cannot be written at `out_prefix`.
    """
    share, held_out_sources = _held_out(validation)
    if any(map(pair_prefix, (*sources, *held_out_sources))):
        if chat:
            raise DataError(f"{sources[0]} is tokenized and holds no chats. Set the format of the source to text.")
        return use_pair(
            sources, held_out_sources, tokenizer, out_prefix, share=share, seed=seed, vocab=vocab, listener=listener
        )
    if not separator:
        raise DataError("An empty separator cannot separate documents. Set `separator` to the text between them.")
    encoder = _encoder(tokenizer, chat)
    fields = Fields(text_key, separator, "chat" if chat else "text")
    held_out = _files(held_out_sources)
    job = _Job(held_out, _files(sources), fields, share, seed, vocab, encoder.marks)
    splits = SPLITS if share or held_out else SPLITS[:1]
    limits = {split: enough[split] for split in splits if enough and not (held_out and split == "valid")}
    with pair_writers(out_prefix, splits, encoder.types, job.key(tokenizer, encoder.tokenizer)) as work:
        if _is_enough(work.writers, limits):
            work.restart(splits)  # a smaller budget gives what it would have given at once
        position = _tokenize(work, job, encoder, workers, limits, listener)
        _refuse_empty(work.writers, validation)
        if stopped := _is_enough(work.writers, limits):
            work.save(position, every=0)
        work.finish(goes_on=stopped)
    _warn_of_surrogates(position)
    read = min(1.0, position.source_bytes / job.bytes) if stopped else 1.0
    return _prepared(work.writers, out_prefix, encoder.end, read)


def _warn_of_surrogates(position: Position) -> None:
    if position.replaced:
        told = f"{position.replaced} unpaired surrogates became U+FFFD, the first in {position.first}."
        warnings.warn(told, stacklevel=3)


def _prepared(writers: Mapping[str, TokenFileWriter], out_prefix: str | Path, end: int, read: float) -> Prepared:
    content = content_of(writer.content for writer in writers.values())
    made = {name: PreparedSplit(Path(f"{out_prefix}.{name}"), w.documents, w.tokens) for name, w in writers.items()}
    return Prepared(made["train"], made.get("valid"), end, content, read)


def _encoder(tokenizer: str | Path, chat: LossOn | None) -> Encoder | ChatEncoder:
    reader = load_tokenizer(tokenizer)
    end, dtype = end_of_document(tokenizer, reader), token_dtype(vocabulary(reader))
    return ChatEncoder(reader, end, dtype, load_template(tokenizer), chat) if chat else Encoder(reader, end, dtype)


@dataclass(frozen=True)
class _Job:
    """All that decides which documents there are, and their splits."""

    held_out: list[Path]
    files: list[Path]
    fields: Fields
    share: float
    seed: int
    vocab: int | None
    marks: Sequence[object]
    """Everything but the tokenizer that determines the tokens of a chat."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in (*self.held_out, *self.files))

    def key(self, folder: str | Path, tokenizer: Tokenizer) -> str:
        """Return a checksum of all that the tokens depend on. folder: that of the tokenizer."""
        from_tokenizer = corpus_marks(folder, tokenizer)
        marks = [file_marks(self.held_out), file_marks(self.files), from_tokenizer, tokenizers.__version__]
        keys = [*self.fields, self.share, self.seed, self.vocab, *self.marks]
        return hashlib.sha256(json.dumps([*marks, *keys]).encode()).hexdigest()

    def items(self, position: Position) -> Iterator[Item]:
        """Yield the documents after a position: held-out files, then the others."""
        for document, after in _read([*self.held_out, *self.files], self.fields, position):
            held = after.file < len(self.held_out) or _draw(self.seed, after.number - 1) < self.share
            yield Item("valid" if held else "train", document, after)


def _tokenize(
    work: PairWriters,
    job: _Job,
    encoder: Encoder | ChatEncoder,
    workers: int,
    limits: Mapping[str, int],
    listener: Listener,
) -> Position:
    """Write the documents that are not written yet, until the limits are reached; return the position after them."""
    position, total = Position(*work.position), job.bytes
    batches = _batches(job.items(position))
    for position in _write(work.writers, batches, encoder, workers, job.vocab, limits):
        work.save(position)
        listener(Event("prepare", min(position.source_bytes, total), total, "bytes", _counts(work.writers)))
    listener(Event("prepare", total, total, "bytes", _counts(work.writers)))
    return position


def _held_out(validation: float | Sequence[str | Path]) -> tuple[float, Sequence[str | Path]]:
    """Return the fraction of documents to hold out, and the sources to hold out whole; one of the two is empty."""
    if not isinstance(validation, float | int):
        return 0.0, validation
    if not 0 <= validation < 1:
        raise DataError(
            f"`validation` {validation} is not a fraction of the documents. Give 0, a number below 1, or files."
        )
    return float(validation), []


def _files(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files to read, and warn of those that are not."""
    here = [source for source in sources if not str(source).startswith(HUB)]
    if left := left_out(here):
        told = "; ".join(f"{names(map(str, files), MOST_LEFT)} ({reason})" for reason, files in left.items())
        warnings.warn(f"Left out of the sources: {told}.", stacklevel=3)
    return every_file(sources)


def _read(files: Sequence[Path], fields: Fields, position: Position) -> Iterator[tuple[Document, Position]]:
    """Yield the documents that follow a position, each with the position after it."""
    at = position
    for number, file in enumerate(files[at.file :], at.file):
        if number > at.file:
            at = at._replace(file=number, inside=0)
        for document in itertools.islice(documents(file, fields), at.inside, None):
            first = at.first or (document.place if document.replaced else "")
            sums = at.number + 1, at.source_bytes + document.source_bytes, at.replaced + document.replaced
            at = Position(number, at.inside + 1, *sums, first)
            yield document, at


def _draw(seed: int, index: int) -> float:
    """Return a pseudo-random number in [0, 1) for a document, by its index and the seed."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += len(item.document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _is_enough(writers: Mapping[str, TokenFileWriter], limits: Mapping[str, int]) -> bool:
    """Return whether each limited split holds its tokens. limits: empty where all tokens are wanted."""
    return bool(limits) and all(writers[split].tokens >= limit for split, limit in limits.items())


def _write(
    writers: Mapping[str, TokenFileWriter],
    batches: Iterator[list[Item]],
    encoder: Encoder | ChatEncoder,
    workers: int,
    vocab: int | None,
    limits: Mapping[str, int],
) -> Iterator[Position]:
    """Encode and write batch by batch, until the limits are reached; yield the position after each batch."""
    waiting = deque[list[Item]]()

    def texts() -> Iterator[list[str]]:
        for batch in batches:
            waiting.append(batch)
            yield [item.document.text for item in batch]

    may_exceed = vocab is not None and vocabulary(encoder.tokenizer) > vocab
    try:
        for encoded in encode_all(texts(), encoder, workers):
            batch = waiting.popleft()
            for item, columns in zip(batch, encoded, strict=True):
                ids = columns[0]
                if may_exceed and ids.max() >= vocab:
                    raise _unknown(item.document, int(ids[ids >= vocab][0]), encoder.tokenizer, vocab)
                writers[item.split].add(*columns)
                if _is_enough(writers, limits):
                    yield item.after
                    return
            yield batch[-1].after
    except EncodeError as error:
        number, reason, advice = error.args
        place = waiting[0][number].document.place
        raise DataError(f"{place} cannot be tokenized: {reason}. {advice}") from error


def _unknown(document: Document, token: int, tokenizer: Tokenizer, vocab: int | None) -> DataError:
    word = tokenizer.id_to_token(token)
    return DataError(
        f"The document that begins at {document.place} has the token {word!r} ({token}), and the model has {vocab} "
        f"entries. Remove the token from the text, or use the tokenizer that came with the model."
    )


def _counts(writers: Mapping[str, TokenFileWriter]) -> dict[str, float]:
    return {
        "documents": sum(writer.documents for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
    }


def _refuse_empty(writers: Mapping[str, TokenFileWriter], validation: object) -> None:
    documents = numbers.counted(sum(each.documents for each in writers.values()), "document")
    for split, writer in writers.items():
        if not writer.documents:
            raise DataError(
                f"`validation` {validation} leaves no document for the {split} split of {documents}. "
                "Set a larger fraction, or name files to hold out."
            )
