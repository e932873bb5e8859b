"""Metrics of the importance of layers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..records import DepthScores
from ..registry import Registry
from .depth import LOSSES, leave_out
from .similarity import block_importance

__all__ = ["DEPTH_METRICS", "DepthMetric"]


@dataclass(frozen=True)
class DepthMetric:
    """A way to measure the importance of layers (a plugin point)."""

    sweep: Callable[..., DepthScores]
    """Function with the arguments of `leave_out`."""
    one_pass: bool = False
    """Whether one pass of the whole network measures all blocks. No layers can then be removed one by one, and `sweep`
    takes no `greedy`."""
    task: object = None
    """Task of the evaluation harness whose score is the metric. Its function is then passed to `sweep` as `metric`."""


DEPTH_METRICS: Registry[DepthMetric] = Registry(
    "depth metric",
    {
        **{name: DepthMetric(partial(leave_out, metric=metric)) for name, metric in LOSSES.items()},
        "bi": DepthMetric(block_importance, one_pass=True),
    },
)
