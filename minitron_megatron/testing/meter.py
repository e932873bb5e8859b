"""Meter of live tensor bytes and their peak on the CPU, where torch has no counter."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LivePeak", "live_peak"]


P = ParamSpec("P")


class LivePeak(TorchDispatchMode):
    """Count the bytes of live tensor storages inside the block, forward and backward, on this thread.

        with LivePeak() as meter:
            loss = fused(hidden, weight)
            loss.backward()
        assert meter.extra < 4 * chunk * vocab * 3

    A storage counts once, however many views it has, from the first operation that creates or uses it until it is
    freed. Not counted: tensors on `meta`, and memory that a kernel allocates and frees internally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = 0
        """Bytes alive on entry, in tensors that Python's garbage collector knows."""
        self.now = 0
        """Bytes alive after the last operation, including those of `start`."""
        self.peak = 0
        """Maximum of `now`."""
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def extra(self) -> int:
        """Bytes of the peak above `start`. Freeing a tensor that was alive on entry lowers it."""
        return self.peak - self.start

    def __enter__(self) -> Self:
        gc.collect()
        for each in gc.get_objects():
            if issubclass(type(each), Tensor):  # isinstance would trigger lazy proxies
                self._count(each)
        self.start = self.peak = self.now
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._alive.clear()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size

    def _drop(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size


def live_peak(fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
    """Return the peak bytes of live tensors during `fn(*args, **kwargs)`, above those alive before it."""
    with LivePeak() as meter:
        fn(*args, **kwargs)
    return meter.extra
