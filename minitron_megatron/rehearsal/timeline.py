"""Bytes alive over modelled time, in few enough points to draw."""

from __future__ import annotations

__all__ = ["Timeline"]

MOST = 512


class Timeline:
    """Most bytes of each stretch of kernels; there are at most twice `MOST` stretches, of the same number of kernels.

    `points`: (modelled seconds at the end of the stretch, bytes).
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, int]] = []
        self._kernels = 1
        """Kernels of a stretch."""
        self._counted = self._most = 0

    def add(self, seconds: float, size: int) -> None:
        """Add a kernel. seconds: at its end. size: most bytes alive since the kernel before."""
        self._counted, self._most = self._counted + 1, max(self._most, size)
        if self._counted < self._kernels:
            return
        self.points.append((seconds, self._most))
        self._counted = self._most = 0
        if len(self.points) == 2 * MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(later[0], max(first[1], later[1])) for first, later in pairs]
            self._kernels *= 2

    def finished(self, seconds: float) -> list[tuple[float, int]]:
        """Return the points with the stretch that has begun, which ends at `seconds`."""
        return [*self.points, (seconds, self._most)] if self._counted else list(self.points)
