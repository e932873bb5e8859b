"""Python's garbage collector and what is imported: half a million objects that live as long as the process.

It would look through all of them again and again, a fifth of the time of the imports, and then at each collection that
megatron-core asks for, one a checkpoint.
"""

from __future__ import annotations

import gc

__all__ = ["relax_gc", "restore_gc"]

ALL_ALIVE = (100_000, 50, 1000)
_usual = gc.get_threshold()


def relax_gc() -> None:
    """From now on nearly everything that is made stays: there is little to collect."""
    gc.set_threshold(*ALL_ALIVE)


def restore_gc() -> None:
    """The work begins: collections are as usual, and look at nothing that was there before."""
    gc.freeze()
    gc.set_threshold(*_usual)
