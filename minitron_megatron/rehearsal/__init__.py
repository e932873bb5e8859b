"""Rehearsal of a run on a cluster that is not there: one rank of each kind, at full size, on a CPU.

Knows: stages of a run, fake CUDA tensors, process groups that reach nobody. Must not know: terminals, command lines.
"""

from .fault import DeviceFault, DeviceFull
from .ledger import Ledger, Section
from .machine import rehearsed_rank
from .plan import Layout, PlannedLayout, plan_layouts
from .rehearse import RankKind, Rehearsal, rank_kinds, rehearse
from .remedy import Remedy, advice, smallest_change
from .stages import COVERED

__all__ = [
    "COVERED",
    "DeviceFault",
    "DeviceFull",
    "Layout",
    "Ledger",
    "PlannedLayout",
    "RankKind",
    "Rehearsal",
    "Remedy",
    "Section",
    "advice",
    "plan_layouts",
    "rank_kinds",
    "rehearse",
    "rehearsed_rank",
    "smallest_change",
]
