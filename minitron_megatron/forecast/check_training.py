"""Checks of a training: its schedule, and its split over data-parallel ranks."""

from __future__ import annotations

from .. import numbers
from ..data import check_split
from ..errors import RecipeError
from ..parallel import Topology
from ..train import TrainingSettings

__all__ = ["check_micro_batches", "check_schedule", "check_sequence"]


def check_schedule(key: str, keys: TrainingSettings, steps: int | None, length: str = "tokens") -> None:
    """Check the learning rates and the warm-up.

    steps: of the training; None where they are not known yet. length: the key that makes it longer.
    """
    if keys.lr < keys.min_lr:
        raise RecipeError(
            f"{key}.lr is {keys.lr:g}, below {key}.min_lr, {keys.min_lr:g}. Set {key}.min_lr to {keys.lr:g} or less."
        )
    if steps is not None and keys.warmup_steps >= steps and keys.warmup_steps > 0:
        raise RecipeError(
            f"{key}.warmup_steps is {keys.warmup_steps}, but training has only {numbers.counted(steps, 'step')}. "
            f"Set {key}.warmup_steps below {steps}, or raise {key}.{length}."
        )


def check_sequence(key: str, sequence: int, topology: Topology) -> None:
    """Check that samples divide over the ranks that share them."""
    if sequence % (unit := topology.sequence_unit):
        by = [f"cp={topology.cp}"] * (topology.cp > 1) + [f"tp={topology.tp}"] * topology.sequence_parallel
        raise RecipeError(
            f"{key} is {sequence}, which cannot be split over {' and '.join(by)}. Choose a multiple of {unit}."
        )


def check_micro_batches(key: str, total: int, micro: int, topology: Topology, replicas: int) -> None:
    """Check that samples divide into micro-batches. replicas: the data-parallel ranks that share the samples."""
    check_split(key, total, micro, replicas)
    unit = micro * replicas
    if topology.vp > 1 and total // unit % topology.pp:
        raise RecipeError(
            f"{key} gives {numbers.counted(total // unit, 'micro-batch', 'micro-batches')}, but the interleaved "
            f"schedule needs a multiple of pp={topology.pp}. Choose a multiple of {unit * topology.pp}, or vp: 1."
        )
