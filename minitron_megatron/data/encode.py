"""Tokenizing in many processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Tokenizer

from ..errors import DataError

__all__ = ["EncodeError", "Encoder", "encode_all", "foreign"]


class EncodeError(Exception):
    """A text cannot be tokenized: its number in its batch, and why."""


@dataclass(frozen=True)
class Encoder:
    """Texts to token ids, each text ended by `end` and without other special tokens than those it spells out."""

    tokenizer: Tokenizer
    end: int
    dtype: DTypeLike

    def __call__(self, texts: Sequence[str]) -> list[NDArray]:
        return [self._ids(number, text) for number, text in enumerate(texts)]

    def _ids(self, number: int, text: str) -> NDArray:
        try:
            return np.array([*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end], self.dtype)
        except BaseException as error:
            if not foreign(error):
                raise
            raise EncodeError(number, str(error)) from None


def foreign(error: BaseException) -> bool:
    """Whether tokenizers may have raised it: bare Exceptions, and panics, which are none; no interrupt is."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def encode_all(batches: Iterable[Sequence[str]], encoder: Encoder, workers: int) -> Iterator[list[NDArray]]:
    """`encoder` of each batch, in the order of `batches`, of which only a few a worker are held at a time.

    Raises EncodeError where a text cannot be tokenized, when its batch's turn comes.
    """
    if workers == 1:
        yield from map(encoder, batches)
        return
    context = multiprocessing.get_context("forkserver")  # fork would copy the threads of a training process
    context.set_forkserver_preload([__name__])  # the imports are then paid once, not once a worker
    with ProcessPoolExecutor(workers, context, _start, (encoder,)) as pool:
        waiting: deque[Future[list[NDArray]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "A process that tokenizes was killed, perhaps for memory. Set fewer data.workers."
            ) from error


_encoder: Encoder


def _start(encoder: Encoder) -> None:
    """Gives a worker its encoder, once rather than with every batch, and lets it end with the process that wants it."""
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: Sequence[str]) -> list[NDArray]:
    return _encoder(texts)
