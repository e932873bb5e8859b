"""Preemption outside of training: after the scheduler's signal the run ends at the next event and keeps its results."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import MinitronError, Preempted, RecipeError
from ..events import Event, Listener
from ..train import local_signals

__all__ = ["PreemptionListener", "raise_when_preempted"]


class PreemptionListener:
    """Listener that raises Preempted after a signal.

    It raises RecipeError instead if a restart would not get further: the job reached its time limit (SIGUSR1) in a
    stage that saves no partial results, and no stage was finished since the start. Training handles signals itself, and
    saves a checkpoint.
    """

    def __init__(self, listener: Listener, signals: Sequence[int]) -> None:
        """signals: the signals received so far; it grows."""
        self._listener, self._signals = listener, signals
        self._stage, self._made_progress = "", False

    def begins(self, stage: str, *, keeps: bool) -> None:
        """Note that `stage` begins. keeps: it saves partial results and resumes from them."""
        self._made_progress = self._made_progress or bool(self._stage) or keeps
        self._stage = stage

    def __call__(self, event: Event) -> None:
        self._listener(event)
        if signal.SIGUSR1 in self._signals and not self._made_progress:
            raise RecipeError(
                f"the job reached its time limit before the stage {self._stage} was done, and no other stage was done "
                "since the start, so that a restart would end the same way. Give the job more time, or more GPUs."
            )
        if self._signals:
            raise Preempted


@contextmanager
def raise_when_preempted(listener: Listener) -> Iterator[PreemptionListener]:
    """Yield the listener for a run. Any failure after a signal becomes Preempted: another rank has exited first."""
    with local_signals() as signals:
        try:
            yield PreemptionListener(listener, signals)
        except MinitronError:
            raise
        except Exception:
            if signals:
                raise Preempted from None
            raise
