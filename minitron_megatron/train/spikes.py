"""Steps whose loss stands out from those before them."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

__all__ = ["Spikes"]

WINDOW, LEAST, TIMES, SHARE = 64, 16, 10.0, 0.05


class Spikes:
    """A loss is a spike where it lies above the median of the 64 before it by 10 times their median deviation, and by
    5 %. Nothing is one before 16 losses are known; spikes themselves are not among those that are known."""

    def __init__(self, losses: Iterable[float] = (), count: int = 0) -> None:
        self.losses, self.count = list(losses), count

    def see(self, loss: float) -> bool:
        """Whether this loss is a spike; counts it if so."""
        if len(self.losses) >= LEAST:
            middle = median(self.losses)
            usual = median(abs(each - middle) for each in self.losses)
            if loss - middle > max(TIMES * usual, SHARE * abs(middle)):
                self.count += 1
                return True
        self.losses = [*self.losses, loss][-WINDOW:]
        return False
