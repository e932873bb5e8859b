"""Test helpers: a pool of real gloo processes, a meter of live tensor memory, tolerances.

Knows: how to start and end processes, tensor storages. Must not know: models, scores, recipes. Only tests and
benchmarks import it.
"""

from .meter import LivePeak, live_peak
from .pool import Pool
from .tolerances import tolerance

__all__ = ["LivePeak", "Pool", "live_peak", "tolerance"]
