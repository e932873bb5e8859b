"""How long a step of decoding takes: from a GPU's data sheet, or fitted to what was measured on some machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError, did_you_mean, expect_number
from ..layout import Shape, active_parameters, flops_per_token, kv_cache_bytes, parameters

__all__ = ["GPUS", "Conditions", "FittedSpeed", "Roofline", "SpeedRow"]

Speed = Callable[[Shape, "Conditions"], float]
"""Seconds of one decoding step of a batch."""


@dataclass(frozen=True)
class Conditions:
    """How a model is served, for the costs that depend on it."""

    batch: int = 1
    """Sequences at a time."""
    context: int = 4096
    """Tokens of each sequence in the key-value cache."""
    weight_bytes: float = 2
    """Of a weight."""
    kv_bytes: int = 2
    """Of a number in the key-value cache."""
    speed: Speed | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            expect_number(name, getattr(self, name), above=0, whole=True)
        for name in ("weight_bytes", "kv_bytes"):
            expect_number(name, getattr(self, name), above=0)

    def weights(self, shape: Shape) -> float:
        """Bytes of all weights."""
        return parameters(shape) * self.weight_bytes

    def cache(self, shape: Shape) -> int:
        """Bytes of the batch's keys and values."""
        return kv_cache_bytes(shape, self.batch, self.context, self.kv_bytes)


GPUS: Mapping[str, tuple[float, float]] = {
    "A100": (2.039e12, 312e12),
    "L40S": (0.864e12, 362e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
}
"""Bytes a second of memory and dense bf16 FLOPs a second, by the data sheets of the SXM (80 GB A100) versions."""


@dataclass(frozen=True)
class Roofline:
    """A step takes as long as its bytes or its FLOPs, whichever is longer: a bound from below, with no overhead."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, gpu: str) -> Roofline:
        """Raises RecipeError for a GPU whose data sheet is not known."""
        if gpu not in GPUS:
            raise RecipeError(f"the GPU {gpu!r} is not known.{did_you_mean(gpu, GPUS)} Known: {', '.join(GPUS)}.")
        return cls(*GPUS[gpu])

    def __call__(self, shape: Shape, conditions: Conditions) -> float:
        work = _work(shape, conditions)
        return max((work["weights"] + work["cache"]) / self.bytes_per_second, work["flops"] / self.flops_per_second)


@dataclass(frozen=True)
class SpeedRow:
    """What was measured of one model."""

    shape: Shape
    conditions: Conditions
    seconds: float
    """Of a decoding step of the batch."""


@dataclass(frozen=True)
class FittedSpeed:
    """A sum of what a step costs at all, a layer, a byte of weights, a byte of cache and a FLOP: none below zero."""

    coefficients: Mapping[str, float]

    @classmethod
    def to(cls, rows: Sequence[SpeedRow]) -> FittedSpeed:
        """The fit with the least squared relative errors. Raises RecipeError where there are fewer than two shapes."""
        if len({row.shape for row in rows}) < 2:
            raise RecipeError(
                "a table of fewer than two models says nothing of others. Run `minitron bench --backend torch` first."
            )
        terms = [{"step": 1.0, "layers": float(row.shape.layers), **_work(row.shape, row.conditions)} for row in rows]
        names = list(terms[0])
        scale = {name: max(term[name] for term in terms) or 1.0 for name in names}
        matrix = np.array([[term[name] / scale[name] for name in names] for term in terms])
        seconds = np.array([row.seconds for row in rows])
        found = _not_negative(matrix / seconds[:, None], np.ones(len(rows)))
        return cls({name: float(value) / scale[name] for name, value in zip(names, found, strict=True)})

    def __call__(self, shape: Shape, conditions: Conditions) -> float:
        terms = {"step": 1.0, "layers": float(shape.layers), **_work(shape, conditions)}
        return sum(self.coefficients[name] * term for name, term in terms.items())


def _work(shape: Shape, conditions: Conditions) -> dict[str, float]:
    """Bytes read and FLOPs done in a decoding step. Of a mixture, the experts that a batch can be expected to reach."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * conditions.context
    looked_up = 0 if shape.tied else shape.vocab * shape.hidden
    return {
        "weights": (_reached(shape, conditions.batch) - looked_up) * conditions.weight_bytes,
        "cache": float(conditions.cache(shape)),
        "flops": float(conditions.batch * (flops_per_token(shape, 0) + attention)),
    }


def _reached(shape: Shape, batch: int) -> float:
    """Parameters that a batch of tokens goes through, if the router treats all experts alike."""
    active = active_parameters(shape)
    if not shape.experts:
        return active
    every, share = parameters(shape), shape.experts_per_token / shape.experts
    expert = (every - active) / (shape.experts - shape.experts_per_token or 1)
    return active + expert * (shape.experts * (1 - (1 - share) ** batch) - shape.experts_per_token)


def _not_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: while some come out below zero the worst of them is left out."""
    found, there = np.zeros(matrix.shape[1]), list(range(matrix.shape[1]))
    while there:
        part = np.linalg.lstsq(matrix[:, there], wanted, rcond=None)[0]
        if part.min() >= 0:
            found[there] = part
            break
        there.pop(int(part.argmin()))
    return found
