"""What goes wrong while mcore writes or reads a distributed checkpoint, as one error of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, MinitronError
from ..parallel import broadcast_object, failed_alone, failed_together

__all__ = ["cause_of", "reading", "writing"]

PLAINLY = {
    "weights_only": "it holds more than tensors and plain values, and nothing else is ever opened",
    "weights only": "it holds more than tensors and plain values, and nothing else is ever opened",
    "unexpected pos": "the file system took a part of a file alone, as when it is full",
    "iostream error": "the file system took a part of a file alone, as when it is full",
}
"""Words of torch's messages that say nothing to a user, or advise to run a stranger's code; and what they mean."""


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Around writing `what`. Raises CheckpointError with the cause.

    An error that mcore raises on every rank has its cause on the first alone: it is told to all. One that a rank meets
    alone is raised there alone, at once: the others wait inside mcore, where no word of ours reaches them.
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
    """Around mcore's and torch's reading of a checkpoint at `path`: whatever they raise is a CheckpointError with the
    cause, for a file that is not what they expect may lead them anywhere."""
    try:
        yield
    except MinitronError:
        raise
    except BaseException as error:
        if not isinstance(error, (Exception, *failed_together())):
            raise
        raise CheckpointError(f"checkpoint {path} cannot be read: {cause_of(error)}.") from error


def cause_of(error: BaseException) -> str:
    """Return the cause in one line without its full stop: of the first rank that torch reports on, which it would print
    with whole tracebacks; the kind of the error where it says nothing."""
    for cause, _ in getattr(error, "failures", {}).values():
        return cause_of(cause)
    text = str(error).strip()
    for words, meaning in PLAINLY.items():
        if words in text.lower():
            return meaning
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
