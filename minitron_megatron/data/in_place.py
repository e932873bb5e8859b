"""Use of a tokenized `.bin/.idx` pair where it lies: checked against the tokenizer, and never copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import DataError
from ..events import Event, Listener
from ..files import whole_file
from .idx import read_index, token_type
from .sources import pair_prefix
from .token_files import (
    BLOCK,
    KINDS,
    MASK,
    SPLITS,
    Checksums,
    Prepared,
    PreparedSplit,
    Share,
    TokenFiles,
    content_of,
    find_pair,
    split_file,
)
from .tokenizer import end_of_document, load_tokenizer, vocabulary

__all__ = ["use_pair"]

ENDS_CHECKED = 4096
"""Number of documents, evenly spaced, whose last token is looked at."""
LEAST_ENDS = 0.5
"""Share of documents that must end with the end-of-document token."""
AGAIN = "Tokenize the text again with this model's tokenizer, or name the text itself."


def use_pair(
    sources: Sequence[str | Path],
    held_out: Sequence[str | Path],
    tokenizer: str | Path,
    out_prefix: str | Path,
    *,
    share: float,
    seed: int,
    vocab: int | None,
    listener: Listener,
) -> Prepared:
    """Write `<out_prefix>.train.json` and `<out_prefix>.valid.json`, which name a pair and the documents to use of it.

    held_out: pair to hold out; if empty, a `share` of the documents is held out.

    All tokens are read once, to find the largest and to compute checksums. Raises DataError where the pair is damaged,
    where its tokens are not those of the tokenizer or the model, or where a split would be empty.
    """
    reader = load_tokenizer(tokenizer)
    end, entries = end_of_document(tokenizer, reader), vocabulary(reader)
    limit = entries if vocab is None else min(entries, vocab)
    pairs = {"train": _only_pair(sources)}
    if held_out:
        pairs["valid"] = _only_pair(held_out)
    total = sum(Path(f"{pair.prefix}.bin").stat().st_size for pair in pairs.values())
    done, sums = 0, dict[Path, Checksums]()
    for pair in pairs.values():
        _check_type(pair, entries)
        _check_ends(pair, end, reader)
        blocks = []
        for block, ids in _blocks(pair):
            blocks.append(hashlib.sha256(block).hexdigest())
            _check_ids(pair, ids, limit, reader)
            done += len(block)
            listener(Event("prepare", done, total, "bytes", {}))
        sums[pair.prefix] = {"idx": pair.content, "block": BLOCK, "bin": blocks}
    parts = {"train": Share(share, seed, False), "valid": Share(share, seed, True)} if share else {}
    return _write(out_prefix, {split: pairs["train"] for split in parts} or pairs, parts, sums, end)


def _only_pair(sources: Sequence[str | Path]) -> TokenFiles:
    prefixes = [pair_prefix(source) for source in sources]
    if len(prefixes) != 1 or prefixes[0] is None:
        told = ", ".join(map(str, sources))
        raise DataError(
            f"{told} mixes a tokenized corpus with others. Make each .bin/.idx pair a source of its own, and hold out "
            "a share of its documents or another pair, by `validation`."
        )
    if Path(f"{prefixes[0]}.{MASK}.idx").exists():
        raise DataError(f"{prefixes[0]} is a tokenized chat, whose mask would be lost. Name the chats themselves.")
    return find_pair(prefixes[0].absolute(), "Copy or tokenize it again.")


def _check_type(pair: TokenFiles, entries: int) -> None:
    kind = token_type(Path(f"{pair.prefix}.idx"))
    if entries - 1 > np.iinfo(kind).max:
        raise DataError(
            f"{pair.prefix} holds tokens of type {np.dtype(kind)}, which is too small for the {entries:,} entries of "
            f"the tokenizer: it was made with another one. {AGAIN}"
        )


def _blocks(pair: TokenFiles) -> Iterator[tuple[bytes, NDArray]]:
    """Yield each block of the `.bin` file, as bytes and as tokens."""
    kind = token_type(Path(f"{pair.prefix}.idx"))
    with Path(f"{pair.prefix}.bin").open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block, np.frombuffer(block, kind)


def _check_ids(pair: TokenFiles, ids: NDArray, limit: int, tokenizer: Tokenizer) -> None:
    most, least = int(ids.max()), int(ids.min())
    if most >= limit or least < 0:
        wrong = most if most >= limit else least
        known = f" ({tokenizer.id_to_token(wrong)!r})" if wrong >= 0 and tokenizer.id_to_token(wrong) else ""
        raise DataError(
            f"{pair.prefix} holds the token {wrong}{known}, and tokenizer and model have {limit:,} entries in common. "
            f"{AGAIN}"
        )


def _check_ends(pair: TokenFiles, end: int, tokenizer: Tokenizer) -> None:
    """Raise DataError unless most documents end with the end-of-document token."""
    idx = Path(f"{pair.prefix}.idx")
    lengths, pointers, documents = read_index(idx)
    chosen = np.unique(np.linspace(1, len(documents) - 1, ENDS_CHECKED, dtype=np.int64))
    sequences = documents[chosen][documents[chosen] > 0] - 1  # the last ones of their documents
    tokens = np.memmap(f"{pair.prefix}.bin", token_type(idx), mode="r")
    last = tokens[pointers[sequences] // tokens.itemsize + lengths[sequences] - 1]
    if (last == end).mean() >= LEAST_ENDS:
        return
    values, counts = np.unique(last, return_counts=True)
    most = int(values[counts.argmax()])
    raise DataError(
        f"Documents of {pair.prefix} do not end with the tokenizer's end-of-document token "
        f"{tokenizer.id_to_token(end)!r} ({end}), but most often with {most}. Tokenize the text again with this "
        "model's tokenizer, and with --append-eod of Megatron-LM's preprocess_data.py."
    )


def _write(
    out_prefix: str | Path,
    pairs: dict[str, TokenFiles],
    parts: dict[str, Share],
    sums: dict[Path, Checksums],
    end: int,
) -> Prepared:
    splits, contents = {}, []
    with ExitStack() as stack:
        for split, pair in pairs.items():
            part = parts.get(split)
            idx = Path(f"{pair.prefix}.idx")
            tokens, documents = pair.tokens, len(read_index(idx).documents) - 1
            if part:
                _, tokens, documents = part.sequences(idx)
            if not tokens:
                raise DataError(
                    f"`validation` {part.share if part else 0} leaves no document for the {split} split of "
                    f"{pair.prefix}. Set a larger fraction, or name another pair to hold out."
                )
            known = sums[pair.prefix]
            content = content_of([known["idx"], *known["bin"], repr(part)])
            file = stack.enter_context(whole_file(split_file(out_prefix, split, "json")))
            told = {"content": content, **known, "pair": str(pair.prefix), "part": asdict(part) if part else None}
            file.write_text(json.dumps(told) + "\n", encoding="utf-8")
            splits[split] = PreparedSplit(pair.prefix, documents, tokens)
            contents.append(content)
        for split in SPLITS:
            for kind in KINDS:
                split_file(out_prefix, split, kind).unlink(missing_ok=True)
    return Prepared(splits["train"], splits.get("valid"), end, content_of(contents))
