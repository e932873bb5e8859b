"""How many bytes of tensors are alive at once, where torch has no counter for it: on the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LivePeak", "live_peak"]


class LivePeak(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered, forward and backward, on this thread.

        with LivePeak() as meter:
            loss = fused(hidden, weight)
            loss.backward()
        assert meter.extra < 4 * chunk * vocab * 3

    A storage counts once, however many views it has, from the first operation that makes or touches it until it is
    freed. Not seen: tensors on `meta`, and what a kernel allocates and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = 0
        """Bytes alive on entry, as far as Python can see them."""
        self.now = 0
        """Bytes alive after the last operation, those of `start` included."""
        self.peak = 0
        """The largest `now`."""
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def extra(self) -> int:
        """Bytes by which the peak lay above the start. Freeing what lived on entry makes room for it."""
        return self.peak - self.start

    def __enter__(self) -> Self:
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):  # isinstance would wake lazy proxies
                self._count(thing)
        self.start = self.peak = self.now
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._alive.clear()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
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


def live_peak(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes of live tensors by which `fn(*args, **kwargs)` rose, at its peak, above what was alive before it."""
    with LivePeak() as meter:
        fn(*args, **kwargs)
    return meter.extra
