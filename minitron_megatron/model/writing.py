"""Errors while mcore writes or reads a distributed checkpoint, turned into CheckpointErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, MinitronError, first_line
from ..parallel import broadcast_object, failed_alone, failed_together

__all__ = ["cause_of", "reading", "writing"]

PLAINLY = {
    **dict.fromkeys(("weights_only", "weights only"), "it holds more than tensors and plain values, which is unsafe"),
    **dict.fromkeys(("unexpected pos", "iostream error"), "only a part of a file was written; the disk may be full"),
}
"""Substring of a message of torch that is unclear, or advises to load untrusted code -> its plain meaning."""


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Raise a CheckpointError with the cause for any error while the block writes `what`.

    If mcore raises on every rank, only rank 0 knows the cause, which is broadcast. An error on one rank alone is raised
    there at once: the other ranks wait inside mcore and cannot be reached.
    """
    try:
        yield
    except failed_together() as error:
        cause = broadcast_object(cause_of(error))
        raise CheckpointError(f"{what} cannot be written: {cause}. {advice}") from error
    except Exception as error:
        if not failed_alone(error):
            raise
        raise CheckpointError(f"{what} cannot be written: {cause_of(error)}. {advice}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a CheckpointError with the cause for any error while mcore and torch read a checkpoint at `path`: a
    malformed file may make them raise anything."""
    try:
        yield
    except MinitronError:
        raise
    except BaseException as error:
        if not isinstance(error, (Exception, *failed_together())):
            raise
        raise CheckpointError(f"checkpoint {path} cannot be read: {cause_of(error)}.") from error


def cause_of(error: BaseException) -> str:
    """Return the first sentence of an error's cause, without a full stop.

    If torch reports failures of several ranks, with tracebacks, this is the cause on the first of them. An error
    without a message gives its type.
    """
    for cause, _ in getattr(error, "failures", {}).values():
        return cause_of(cause)
    text = str(error).strip()
    for words, meaning in PLAINLY.items():
        if words in text.lower():
            return meaning
    return first_line(error).partition(". ")[0]
