"""Detection of loss spikes."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

__all__ = ["Spikes"]

WINDOW, LEAST, DEVIATIONS, SHARE = 64, 16, 10.0, 0.05


class Spikes:
    """Counter of loss spikes.

    A loss is a spike if it exceeds the median of the previous 64 losses by more than 10 times their median absolute
    deviation and by more than 5 %. The first 16 losses are never spikes; spikes are not kept among the previous losses.
    """

    def __init__(self, losses: Iterable[float] = (), count: int = 0) -> None:
        self.losses, self.count = list(losses), count

    def see(self, loss: float) -> bool:
        """Return whether this loss is a spike, and count it if so."""
        if len(self.losses) >= LEAST:
            middle = median(self.losses)
            deviation = median(abs(each - middle) for each in self.losses)
            if loss - middle > max(DEVIATIONS * deviation, SHARE * abs(middle)):
                self.count += 1
                return True
        self.losses = [*self.losses, loss][-WINDOW:]
        return False
