"""Tokenizing text to `.bin/.idx` pairs; the result does not depend on the number of processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, tee
from pathlib import Path

from ..errors import DataError
from ..events import Event, Listener, silent
from .document import Document, Fields
from .encode import EncodeError, Encoder, encode_all
from .hub import hub_files
from .in_place import use_pair
from .readers import documents
from .sources import HUB, left_out, names, pair_prefix, text_files
from .token_files import SPLITS, Prepared, PreparedSplit, content_of
from .token_writer import TokenFileWriter, pair_writers, token_dtype
from .tokenizer import end_of_document, load_tokenizer, vocabulary

__all__ = ["prepare"]

BATCH_CHARS = 1 << 20
"""Characters of text sent to a worker process at a time."""
MOST_LEFT = 20
"""Maximum number of files that a warning lists for one reason."""

Assigned = tuple[str, Document]
"""Pair (name of the split, document)."""


def prepare(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out_prefix: str | Path,
    *,
    validation: float | Sequence[str | Path] = 0.01,
    workers: int = 1,
    text_key: str = "text",
    separator: str = "<|endoftext|>",
    seed: int = 0,
    vocab: int | None = None,
    listener: Listener = silent,
) -> Prepared:
    """Tokenize the text of `sources`: files, folders, globs, and data sets of the Hub (`hf://owner/name:split`).

    A source that names a tokenized `.bin/.idx` pair is used in place (`use_pair`), and must be the only one.

    `text_key` is the key or column of the text in `.jsonl`, `.json`, `.parquet` and `.arrow` files; `separator` parts
    the documents of `.txt` files.

    Writes `<out_prefix>.train.bin/.idx` and `<out_prefix>.valid.bin/.idx`. `validation` is the fraction of documents
    to hold out, drawn by `seed` (0: no validation split), or the sources to hold out. `tokenizer` is a Hugging Face
    folder; each document ends with its end-of-sequence token and gets no other special token. `vocab` is the number of
    entries of the model's embedding. Not collective: call it in one process.

    Warns of files in folders that are skipped as they hold no data, and of unpaired surrogates, which become U+FFFD.
    Raises DataError where a source or the tokenizer cannot be read, where a document has a token that the model does
    not have, or where a split would be empty; FileError where files cannot be written at `out_prefix`.
    """
    share = float(validation) if isinstance(validation, float | int) else 0.0
    if not 0 <= share < 1:
        raise DataError(
            f"validation={validation} is not a fraction of the documents. Give 0, a number below 1, or files."
        )
    held_out_sources = [] if isinstance(validation, float | int) else validation
    if any(map(pair_prefix, (*sources, *held_out_sources))):
        keys = {"share": share, "seed": seed, "vocab": vocab, "listener": listener}
        return use_pair(sources, held_out_sources, tokenizer, out_prefix, **keys)
    if not separator:
        raise DataError("An empty separator cannot separate documents. Set data.separator to the text between them.")
    reader = load_tokenizer(tokenizer)
    encoder = Encoder(reader, end_of_document(tokenizer, reader), token_dtype(vocabulary(reader)))
    files, held_out = _files(sources), _files(held_out_sources)
    total = sum(file.stat().st_size for file in chain(files, held_out))

    read = partial(_read, fields=Fields(text_key, separator))
    drawn = (("valid" if _draw(seed, i) < share else "train", document) for i, document in enumerate(read(files)))
    named = (("valid", document) for document in read(held_out))
    with pair_writers(out_prefix, SPLITS if share or held_out else ("train",), encoder.dtype) as writers:
        done = 0
        for size in _write(writers, _batches(chain(drawn, named)), encoder, workers, vocab):
            done = min(done + size, total)
            listener(Event("prepare", done, total, "bytes", _counts(writers)))
        listener(Event("prepare", total, total, "bytes", _counts(writers)))
        _refuse_empty(writers, validation)
    content = content_of(writer.content for writer in writers.values())
    splits = {name: PreparedSplit(Path(f"{out_prefix}.{name}"), w.documents, w.tokens) for name, w in writers.items()}
    return Prepared(splits["train"], splits.get("valid"), encoder.end, content)


def _files(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files to read, and warn of those that are not."""
    online = [str(source) for source in sources if str(source).startswith(HUB)]
    here = [source for source in sources if str(source) not in online]
    if left := left_out(here):
        told = "; ".join(f"{names(map(str, files), MOST_LEFT)} ({reason})" for reason, files in left.items())
        warnings.warn(f"Left out of the sources: {told}.", stacklevel=3)
    return [*text_files(here), *(file for source in online for file in hub_files(source))]


def _read(files: Iterable[Path], fields: Fields) -> Iterator[Document]:
    halves, first = 0, ""
    for file in files:
        for document in documents(file, fields):
            if document.replaced:
                halves, first = halves + document.replaced, first or document.place
            yield document
    if halves:
        warnings.warn(f"{halves} unpaired surrogates became U+FFFD, the first in {first}.", stacklevel=2)


def _draw(seed: int, index: int) -> float:
    """Return a pseudo-random number in [0, 1) for a document, by its index and the seed."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _batches(items: Iterable[Assigned]) -> Iterator[list[Assigned]]:
    batch: list[Assigned] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += len(item[1].text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write(
    writers: Mapping[str, TokenFileWriter],
    batches: Iterator[list[Assigned]],
    encoder: Encoder,
    workers: int,
    vocab: int | None,
) -> Iterator[int]:
    """Encode and write batch by batch; yield the source bytes of each batch."""
    batches, ahead = tee(batches)
    texts = ([document.text for _, document in batch] for batch in ahead)
    may_exceed = vocab is not None and vocabulary(encoder.tokenizer) > vocab
    try:
        for encoded in encode_all(texts, encoder, workers):
            batch = next(batches)
            for (split, document), ids in zip(batch, encoded, strict=True):
                if may_exceed and ids.max() >= vocab:
                    raise _unknown(document, int(ids[ids >= vocab][0]), encoder, vocab)
                writers[split].add(ids)
            yield sum(document.source_bytes for _, document in batch)
    except EncodeError as error:
        number, reason = error.args
        place = next(batches)[number][1].place
        raise DataError(
            f"{place} cannot be tokenized: {reason}. Correct the text, or the model's tokenizer."
        ) from error


def _unknown(document: Document, token: int, encoder: Encoder, vocab: int | None) -> DataError:
    word = encoder.tokenizer.id_to_token(token)
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
    for split, writer in writers.items():
        if not writer.documents:
            raise DataError(
                f"validation={validation} leaves no document for the {split} split of "
                f"{sum(w.documents for w in writers.values())}. Set another fraction, or 0, or name files to hold out."
            )
