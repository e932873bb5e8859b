"""Standard output and error that survive a closed pipe and characters that the terminal cannot encode."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from typing import TextIO

__all__ = ["keep_writing", "wrapped"]


def keep_writing() -> None:
    """Replace sys.stdout and sys.stderr by streams that survive a closed pipe, and escape unencodable characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Unbroken(stream))


def wrapped(text: str, stream: TextIO) -> str:
    """Return a sentence in lines that end between words, if the stream is a terminal; a file has it in one line."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )


class _Unbroken:
    """A text stream that discards its output once the pipe is closed."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()
            self._stream.flush()

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
