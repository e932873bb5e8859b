"""Latency of a decoding step, from a GPU's data sheet or fitted to measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import RecipeError, did_you_mean
from ..gpus import GPUS
from ..layout import Shape, active_parameters, flops_per_token, kv_cache_bytes, parameters
from ..settings import Count, FilePath, Settings, model_validator

__all__ = ["Conditions", "FittedSpeed", "Roofline", "Serving", "SpeedRow"]

Speed = Callable[[Shape, "Conditions"], float]
"""(shape, conditions) -> seconds of one decoding step of the batch."""


Number = Literal["float32", "bfloat16", "float8"]


class Serving(Settings):
    """Serving conditions, for the budgets that depend on them."""

    batch: Count = 1
    """Sequences decoded at a time."""
    context: Count | None = None
    """Tokens per sequence in the KV cache. Default: `data.sequence`."""
    weights: Number = "bfloat16"
    """Dtype of the weights."""
    kv_cache: Number = "bfloat16"
    """Dtype of the KV cache."""
    gpu: str | None = None
    """Predict speed from this GPU's data sheet (roofline): the larger of bytes over bandwidth and FLOPs over peak,
    without overhead."""
    table: FilePath | None = None
    """Predict speed from a fit to measurements: a `bench/table.json` of `minitron bench --backend torch`."""

    @model_validator(mode="after")
    def _one_speed(self) -> Serving:
        if self.gpu and self.table:
            raise ValueError("Speed comes from gpu or from table, not from both: remove one")
        if self.gpu:
            Roofline.of(self.gpu)
        return self


@dataclass(frozen=True)
class Conditions:
    """Serving conditions as numbers, from which costs are counted."""

    batch: int = 1
    """Sequences decoded at once."""
    context: int = 4096
    """Tokens of each sequence in the KV cache."""
    weight_bytes: float = 2
    """Bytes of one weight."""
    kv_bytes: int = 2
    """Bytes of one number in the KV cache."""
    speed: Speed | None = None

    def weights(self, shape: Shape) -> float:
        """Return the bytes of all weights."""
        return parameters(shape) * self.weight_bytes

    def cache(self, shape: Shape) -> int:
        """Return the bytes of the batch's KV cache."""
        return kv_cache_bytes(shape, self.batch, self.context, self.kv_bytes)


@dataclass(frozen=True)
class Roofline:
    """Roofline model: a step takes the longer of its memory time and its compute time; a lower bound, no overhead."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, gpu: str) -> Roofline:
        """Return the roofline of a GPU. Raises RecipeError for a GPU that is not in `GPUS`."""
        if gpu not in GPUS:
            raise RecipeError(f"the GPU {gpu!r} is not known.{did_you_mean(gpu, GPUS)} Known: {', '.join(GPUS)}.")
        return cls(GPUS[gpu].bandwidth, GPUS[gpu].flops)

    def __call__(self, shape: Shape, conditions: Conditions) -> float:
        work = _work(shape, conditions)
        return max((work["weights"] + work["cache"]) / self.bytes_per_second, work["flops"] / self.flops_per_second)


@dataclass(frozen=True)
class SpeedRow:
    """Measured speed of one model."""

    shape: Shape
    conditions: Conditions
    seconds: float
    """Seconds of a decoding step of the batch."""


@dataclass(frozen=True)
class FittedSpeed:
    """Linear model of a step's seconds: a constant, and costs per layer, weight byte, cache byte and FLOP, all >= 0."""

    coefficients: Mapping[str, float]

    @classmethod
    def to(cls, rows: Sequence[SpeedRow]) -> FittedSpeed:
        """Return the fit with the least squared relative errors. Raises RecipeError for fewer than two shapes."""
        if len({row.shape for row in rows}) < 2:
            raise RecipeError("a table of speeds needs at least two models. Measure more of them.")
        terms = [{"step": 1.0, "layers": float(row.shape.layers), **_work(row.shape, row.conditions)} for row in rows]
        names = list(terms[0])
        scale = {name: max(term[name] for term in terms) or 1.0 for name in names}
        matrix = np.array([[term[name] / scale[name] for name in names] for term in terms])
        seconds = np.array([row.seconds for row in rows])
        found = _nonnegative_least_squares(matrix / seconds[:, None], np.ones(len(rows)))
        return cls({name: float(value) / scale[name] for name, value in zip(names, found, strict=True)})

    def __call__(self, shape: Shape, conditions: Conditions) -> float:
        terms = {"step": 1.0, "layers": float(shape.layers), **_work(shape, conditions)}
        return sum(self.coefficients[name] * term for name, term in terms.items())


def _work(shape: Shape, conditions: Conditions) -> dict[str, float]:
    """Return bytes read and FLOPs of a decoding step, for the experts (if any) that a batch is expected to use."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * conditions.context
    embedding = 0 if shape.tied else shape.vocab * shape.hidden  # a lookup reads a few rows of it
    return {
        "weights": (_used_parameters(shape, conditions.batch) - embedding) * conditions.weight_bytes,
        "cache": float(conditions.cache(shape)),
        "flops": float(conditions.batch * (flops_per_token(shape, 0) + attention)),
    }


def _used_parameters(shape: Shape, batch: int) -> float:
    """Return the expected number of parameters that a batch of tokens uses, if the router picks experts uniformly."""
    active = active_parameters(shape)
    if not shape.experts:
        return active
    every, share = parameters(shape), shape.experts_per_token / shape.experts
    expert = (every - active) / (shape.experts - shape.experts_per_token or 1)
    return active + expert * (shape.experts * (1 - (1 - share) ** batch) - shape.experts_per_token)


def _nonnegative_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Solve least squares with coefficients >= 0: drop the most negative one and solve again until none is negative."""
    found, active = np.zeros(matrix.shape[1]), list(range(matrix.shape[1]))
    while active:
        part = np.linalg.lstsq(matrix[:, active], wanted, rcond=None)[0]
        if part.min() >= 0:
            found[active] = part
            break
        active.pop(int(part.argmin()))
    return found
