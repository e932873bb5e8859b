"""Tune Python's garbage collector around imports.

Imports create half a million objects that live as long as the process. With the default thresholds the collector scans
them again and again, a fifth of the import time, and once more in each collection that megatron-core requests, one per
checkpoint.
"""

from __future__ import annotations

import gc

__all__ = ["relax_gc", "restore_gc"]

IMPORT_THRESHOLD = (100_000, 50, 1000)
_default_threshold = gc.get_threshold()


def relax_gc() -> None:
    """Collect rarely while modules are imported, since nearly all objects stay alive."""
    gc.set_threshold(*IMPORT_THRESHOLD)


def restore_gc() -> None:
    """Restore the default thresholds, and exclude all objects that exist now from collections."""
    gc.freeze()
    gc.set_threshold(*_default_threshold)
