"""Tokenizing in parallel processes, with results in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Tokenizer

from ..errors import DataError
from .pieces import LONG, pieces

__all__ = ["Columns", "EncodeError", "Encoder", "encode_all", "foreign"]

Columns = tuple[NDArray, ...]
"""Token ids of a document, and of a chat also the mark of each token."""
Encode = Callable[[Sequence[str]], list[Columns]]


class EncodeError(Exception):
    """A text cannot be tokenized. Arguments: its index in the batch, the reason, and what to do."""


@dataclass(frozen=True)
class Encoder:
    """Texts to token ids. Each text ends with `end`; no other special token is added."""

    tokenizer: Tokenizer
    end: int
    dtype: DTypeLike
    marks: tuple[()] = ()

    @property
    def types(self) -> list[DTypeLike]:
        """Types of the columns."""
        return [self.dtype]

    def __call__(self, texts: Sequence[str]) -> list[Columns]:
        try:
            short = iter(self._ids([text for text in texts if len(text) <= LONG]))
            return [(next(short) if len(text) <= LONG else self._long(text),) for text in texts]
        except BaseException as error:
            if not foreign(error):
                raise
            raise next(filter(None, map(self._refused, range(len(texts)), texts)), error) from None

    def _ids(self, texts: Sequence[str]) -> list[NDArray]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # without offsets
        return [np.array([*each.ids, self.end], self.dtype) for each in encoded]

    def _long(self, text: str) -> NDArray:
        parts = [self._ids([piece])[0][:-1] for piece in pieces(text, self.tokenizer)]
        return np.concatenate([*parts, np.array([self.end], self.dtype)])

    def _refused(self, number: int, text: str) -> EncodeError | None:
        """Return the error of a text that cannot be tokenized."""
        try:
            self._long(text)
        except BaseException as error:
            if not foreign(error):
                raise
            return EncodeError(number, str(error), "Correct the text, or the model's tokenizer.")
        return None


def foreign(error: BaseException) -> bool:
    """Return whether an error may come from tokenizers: an Exception, or a Rust panic, which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def encode_all(batches: Iterable[Sequence[str]], encoder: Encode, workers: int) -> Iterator[list[Columns]]:
    """Yield the encoded batches, in the order of `batches`; only a few batches per worker are in memory at a time.

    Raises EncodeError for a text that cannot be tokenized, when its batch is due.
    """
    if workers == 1:
        yield from map(encoder, batches)
        return
    context = multiprocessing.get_context("forkserver")  # fork is unsafe in a process with threads
    context.set_forkserver_preload([__name__])  # so that imports run once, not once per worker
    with ProcessPoolExecutor(workers, context, _start, (encoder,)) as pool:
        waiting: deque[Future[list[Columns]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "A tokenizer process was killed, perhaps for lack of memory. Use fewer `workers`."
            ) from error


_encoder: Encode


def _start(encoder: Encode) -> None:
    """Initialise a worker: keep the encoder, so that batches need not carry it, and end with the parent process."""
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent ends; a worker whose parent was killed would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: Sequence[str]) -> list[Columns]:
    return _encoder(texts)
