"""Stand-in for CUDA in torch's C++ parts, on a torch that was built without it.

Fake tensors say that they are on `cuda`. Autograd's engine then asks for the guard and the hooks of that device, which
a CPU build does not have. Copies of the guard of `meta`, which does nothing, and of the hooks that every build has are
put in their place, by their virtual tables: no compiler is needed, and no file of torch changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from ..errors import TopologyError

__all__ = ["cuda_stand_in"]

CUDA, META = 1, 14
"""torch's numbers of these device types (c10/core/DeviceType.h)."""
GUARD_SLOTS, HOOK_SLOTS = 30, 60
"""Entries of the virtual tables that are copied: all that there are, and some more."""

TYPE, SET_DEVICE, DEVICE_COUNT = 0, 3, 15
NOTHING = (11, 12, 13, 18, 20, 21)
"""Guard's functions that must do nothing: destroy, record and block on events, wait for streams and devices."""
ONES = (TYPE, 1, 2, 5, 6, 7, 8, 9, 14)
"""Guard's functions that answer 1: CUDA's number; device {CUDA, 0} and its streams, which are a 1 too; an event's
query."""

HOOK_IS_BUILT, HOOK_HAS_CUDA = 2, 16
HOOK_ONES = (HOOK_IS_BUILT, 3, 4, 6, HOOK_HAS_CUDA)
"""Hooks that answer 1: built, available, has a context, number of devices, has CUDA."""
HOOK_ZEROS, HOOK_NOTHING = (8, 9, 10), (5, 7)
"""Hooks that answer 0 (the current device, exchanges of it), and that do nothing (init, set the device)."""

Table: TypeAlias = "ctypes.Array[ctypes.c_void_p] | ctypes._Pointer[ctypes.c_void_p]"


@contextmanager
def cuda_stand_in() -> Iterator[None]:
    """Make torch's C++ parts believe in one CUDA device inside the context.

    Raises TopologyError on a torch that was built for CUDA or whose tables look otherwise.
    """
    if torch.backends.cuda.is_built():
        raise TopologyError(
            "this torch is built for CUDA, and a rehearsal needs a build for CPUs alone. Rehearse where "
            "`pip install torch --index-url https://download.pytorch.org/whl/cpu` was used, such as on a laptop."
        )
    library = Path(torch.__path__[0]) / "lib"
    core, cpu = ctypes.CDLL(str(library / "libc10.so")), ctypes.CDLL(str(library / "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * 22).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    get_hooks = cpu._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    before = hooks[0]
    guard_table, hook_table = _guard_table(guards[META] or 0), _hook_table(hooks, guards[META] or 0)
    guard = (ctypes.c_void_p * 4)(_start(guard_table))
    guards[CUDA], hooks[0] = ctypes.addressof(guard), _start(hook_table)
    _kept.extend((guard_table, hook_table, guard))
    try:
        yield
    finally:
        guards[CUDA], hooks[0] = None, before


_kept: list[Table] = []
"""Tables and objects that threads of autograd's engine may still use after the context."""


def _guard_table(meta: int) -> Table:
    original = _slots(meta)
    _expect(original[DEVICE_COUNT], meta, 1)
    _expect(original[TYPE], meta, META)
    table = _copy(original, GUARD_SLOTS)
    for slot in ONES:
        table[2 + slot] = original[DEVICE_COUNT]
    for slot in NOTHING:
        table[2 + slot] = original[SET_DEVICE]
    return table


def _hook_table(hooks: Table, meta: int) -> Table:
    at = ctypes.cast(hooks, ctypes.c_void_p).value or 0
    original, guard = _slots(at), _slots(meta)
    _expect(original[HOOK_IS_BUILT], at, 0)
    _expect(original[HOOK_HAS_CUDA], at, 0)
    table = _copy(original, HOOK_SLOTS)
    for slots, function in (
        (HOOK_ONES, guard[DEVICE_COUNT]),
        (HOOK_ZEROS, original[HOOK_IS_BUILT]),
        (HOOK_NOTHING, guard[SET_DEVICE]),
    ):
        for slot in slots:
            table[2 + slot] = function
    return table


def _slots(address: int) -> Table:
    """Return the virtual table of the C++ object at an address."""
    return ctypes.cast(ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0], ctypes.POINTER(ctypes.c_void_p))


def _copy(table: Table, length: int) -> Table:
    """Return a copy of a virtual table, with the two entries before its start."""
    return (ctypes.c_void_p * (length + 2))(*(table[at - 2] for at in range(length + 2)))


def _start(table: Table) -> int:
    return ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p)


def _expect(function: int | None, thing: int, value: int) -> None:
    found = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(function or 0)(thing)
    if found != value:
        raise TopologyError(
            f"torch {torch.__version__} has other tables of devices than a rehearsal knows ({found} is not {value}). "
            "Use the versions in constraints.txt."
        )
