"""Ledger of a rehearsal: live bytes by kind, and the operations, collectives and waits of each section of the work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from .fault import DeviceFull
from .places import ACTIVATIONS, Place
from .timeline import Timeline

__all__ = ["Ledger", "Section", "Sums"]

NOTED_GROWTH = 1.002
"""Growth of the peak from which the bytes by kind are noted anew: noting each one would take longer than the work."""


class Sums(dict[str, float]):
    """Sums by name; an absent one is zero."""

    def __missing__(self, name: str) -> int:
        return 0


@dataclass(frozen=True)
class Allocation:
    """Storage that is alive on the device."""

    storage: weakref.ref[torch.UntypedStorage]
    size: int
    """Bytes, rounded up to the allocator's blocks."""
    kind: str


@dataclass
class Section:
    """Sums of one section of the work on one rank; all are additive."""

    flops: Sums = field(default_factory=Sums)
    """Operation -> floating-point operations."""
    touched: Sums = field(default_factory=Sums)
    """Operation -> bytes read and written in device memory."""
    kernels: Sums = field(default_factory=Sums)
    """Operation -> number of kernels."""
    waits: Sums = field(default_factory=Sums)
    """Cause and line -> times that the host waits for the device."""
    sent: Sums = field(default_factory=Sums)
    """Collective, group and its size -> bytes."""
    calls: Sums = field(default_factory=Sums)
    """The same -> number of collectives."""
    seconds: Sums = field(default_factory=Sums)
    """Line -> modelled seconds."""
    by_resource: Sums = field(default_factory=Sums)
    """matmul, attention, memory, communication -> modelled seconds."""
    peak_by_kind: Sums = field(default_factory=Sums)
    """Kind -> bytes alive at the peak."""
    peak: int = 0
    """Most bytes alive at a time."""
    over: str = ""
    """The first tensor that did not fit the device."""
    timeline: Timeline = field(default_factory=Timeline)
    """Bytes alive over modelled time."""
    elapsed: float = 0.0
    """Modelled seconds of what was rehearsed."""

    def grown(self, smaller: Section, steps: float) -> Section:
        """Return this section plus `steps` times its difference from one with one unit of work less.

        Its bytes over time stay those of what was rehearsed.
        """
        section = replace(self, peak=self.peak + round(steps * max(0, self.peak - smaller.peak)))
        for each in fields(self):
            mine, other = getattr(self, each.name), getattr(smaller, each.name)
            if isinstance(mine, Sums):
                more = Sums({key: mine[key] + steps * max(0, mine[key] - other[key]) for key in mine})
                setattr(section, each.name, more)
        return section


class Ledger:
    """Counts what a rank does; `section` is the one that is being filled."""

    def __init__(self, block: int = 512, limit: int | None = None, stops_when_full: bool = False) -> None:
        """block: unit in bytes of torch's allocator on CUDA. limit: bytes of the device's memory. stops_when_full:
        raise DeviceFull at the first tensor beyond the limit, where else only its place is noted."""
        self.block, self.limit, self.stops_when_full = block, limit, stops_when_full
        self.section = Section()
        self.wants_float64 = False
        """Whether large tensors of float64 are on purpose, as in a refit; else each is a fault."""
        self.now = 0
        """Bytes alive."""
        self._by_kind: Sums = Sums()
        self._alive: dict[int, Allocation] = {}
        self._noted = 0.0
        self._highest = 0
        """Most bytes alive since the last kernel."""
        self._seconds = 0.0
        """Modelled seconds since the first section began."""
        self._busy: dict[str, float] = {}
        """Network -> modelled seconds until which it is busy with collectives that have been started."""
        self._named = ""

    def begin(self) -> Section:
        """Start a new section and return it; what is alive stays."""
        self.section = Section(peak=self.now, peak_by_kind=Sums(self._by_kind))
        self._noted = self._highest = self.now
        return self.section

    @contextmanager
    def naming(self, kind: str) -> Iterator[None]:
        """Count what is allocated inside the context as this kind; an outer context's kind comes first."""
        before = self._named
        self._named = before or kind
        try:
            yield
        finally:
            self._named = before

    def allocate(self, tensor: Tensor, place: Callable[[], Place]) -> bool:
        """Count a tensor's storage until it is freed; return whether it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known.storage() is not None:
            return False
        size = -(-storage.nbytes() // self.block) * self.block
        at = place()
        kind = self._named if self._named and at.kind == ACTIVATIONS else at.kind
        self._alive[key] = Allocation(weakref.ref(storage, lambda _: self._free(key)), size, kind)
        self.now += size
        self._by_kind[kind] += size
        if self.limit is not None and self.now > self.limit and not self.section.over:
            self.section.over = f"{tensor.dtype} {list(tensor.shape)} at {at.line}".replace("torch.", "")
            if self.stops_when_full:
                raise DeviceFull(self.section.over)
        self._note()
        return True

    def spend(self, seconds: float) -> None:
        """Count modelled time that the device spends on a kernel, or waits for a collective."""
        section = self.section
        self._seconds += seconds
        section.elapsed += seconds
        section.timeline.add(section.elapsed, self._highest)
        self._highest = self.now

    def start_collective(self, network: str, seconds: float) -> Callable[[], float]:
        """Start a collective, after those that have been started on the same network; return a function that waits for
        its end, and returns the seconds that the device waited."""
        end = self._busy[network] = max(self._seconds, self._busy.get(network, 0.0)) + seconds

        def wait() -> float:
            waited = max(0.0, end - self._seconds)
            self.spend(waited)
            return waited

        return wait

    def _note(self) -> None:
        section = self.section
        self._highest = max(self._highest, self.now)
        if self.now <= section.peak:
            return
        section.peak = self.now
        if self.now > self._noted * NOTED_GROWTH:
            self._noted = self.now
            section.peak_by_kind = Sums(self._by_kind)

    def _free(self, key: int) -> None:
        found = self._alive.pop(key, None)
        if found is not None:
            self.now -= found.size
            self._by_kind[found.kind] -= found.size

    def hold(self, extra: int) -> None:
        """Count bytes that are alive for a moment, inside a collective."""
        section = self.section
        self._highest = max(self._highest, self.now + extra)
        if self.now + extra > section.peak:
            section.peak = self.now + extra
            section.peak_by_kind = Sums(self._by_kind)
            section.peak_by_kind["communication"] += extra
