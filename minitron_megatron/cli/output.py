"""Standard output and error: a reader that has gone, or a character that a terminal lacks, ends no work."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

__all__ = ["keep_writing"]


def keep_writing() -> None:
    """Replace sys.stdout and sys.stderr by streams that go on when nobody reads them, and escape what they lack."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Unbroken(stream))


class _Unbroken:
    """A text stream whose writes go nowhere once its reader has gone."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()
            self._stream.flush()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
