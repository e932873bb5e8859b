"""What goes wrong while mcore writes a distributed checkpoint, as one error of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError
from ..parallel import broadcast_object, failed_alone, failed_together

__all__ = ["cause_of", "writing"]


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
        raise CheckpointError(f"{what} cannot be written: {error}. {advice}") from error


def cause_of(error: BaseException) -> str:
    """The error of the first rank that torch reports on, which it would print with whole tracebacks; else `error`."""
    for cause, _ in getattr(error, "failures", {}).values():
        return str(cause)
    return str(error)
