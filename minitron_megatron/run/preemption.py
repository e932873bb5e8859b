"""The scheduler's signal where nothing trains: the run ends at the next event, and what is done stays."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import MinitronError, Preempted, RecipeError
from ..events import Event, Listener
from ..train import local_signals

__all__ = ["PreemptionListener", "raise_when_preempted"]


class PreemptionListener:
    """A listener that raises Preempted after a signal, or RecipeError where the next start would get no further: the
    time limit's came (SIGUSR1), and a stage that keeps nothing half done had all the time since this start.

    Training hears its signals itself, and saves.
    """

    def __init__(self, listener: Listener, heard: Sequence[int]) -> None:
        self._listener, self._heard = listener, heard
        self._stage, self._gets_on = "", False

    def begins(self, stage: str, *, keeps: bool) -> None:
        """From now on `stage` is at work; keeps: it goes on from what it had."""
        self._gets_on = self._gets_on or bool(self._stage) or keeps
        self._stage = stage

    def __call__(self, event: Event) -> None:
        self._listener(event)
        if signal.SIGUSR1 in self._heard and not self._gets_on:
            raise RecipeError(
                f"the time limit's signal came before the stage {self._stage} was done, and nothing else was done since"
                " the start: it would come so again. Give the job more time, or more GPUs."
            )
        if self._heard:
            raise Preempted


@contextmanager
def raise_when_preempted(listener: Listener) -> Iterator[PreemptionListener]:
    """Yields the listener for a run. A failure after a signal is Preempted too: another rank has left first."""
    with local_signals() as heard:
        try:
            yield PreemptionListener(listener, heard)
        except MinitronError:
            raise
        except Exception:
            if heard:
                raise Preempted from None
            raise
