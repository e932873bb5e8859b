"""What tests of parallel and of frugal code need: real gloo processes, a meter of live memory, tolerances.

Knows: how to start and end processes, tensors' storages. Must not know: models, scores, recipes. Only tests import it.
"""

from .meter import LivePeak, live_peak
from .pool import Pool
from .tolerances import tolerance

__all__ = ["LivePeak", "Pool", "live_peak", "tolerance"]
