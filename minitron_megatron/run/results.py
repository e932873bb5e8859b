"""Types of the stages' results; records are validated against them when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired

from typing_extensions import TypedDict

__all__ = ["RESULTS", "Measured", "Record"]


class Record(TypedDict):
    """Record of a finished stage."""

    fingerprint: str
    result: dict[str, Any]
    seconds: float
    peak_bytes: int


class Source(TypedDict):
    tokens: int
    validation_tokens: int
    end: int
    content: str
    weight: float


class Prepared(TypedDict):
    model_hash: str
    sources: dict[str, Source]
    sequence: int
    seed: int
    cross_documents: bool
    config: str


class Model(TypedDict):
    hash: str
    files: str
    """Checksum of the list of the model files' checksums."""


class Trained(Model):
    tokens: int


class Scored(TypedDict):
    samples: int
    tokens: int
    statistic: dict[str, str]
    depth: str | None
    files: dict[str, str]


class Searched(TypedDict):
    winner: str
    by: str
    loss: float | None
    sizes: dict[str, int]
    layers: list[int] | None
    candidates: int
    distilled: int


class Refit(TypedDict):
    method: str
    tokens: int
    layers: int
    repaired: int
    """Layers whose weights changed."""


class Pruned(Model):
    trimmed_files: NotRequired[str]
    """The same of the model before its refit."""
    refit: NotRequired[Refit]
    margins: dict[str, float | None]
    by: str
    layers: list[int]
    rounds: list[dict[str, int]]


class Evaluated(TypedDict):
    loss: dict[str, float | None]


class Exported(Model):
    dtype: str


class Measured(TypedDict):
    """A model's row of the summary, saved while the other models are measured."""

    model: str
    parameters: int
    loss_nats_per_token: float
    perplexity: float
    loss_by_source: dict[str, float | None]
    tasks: dict[str, float | None]


RESULTS: Mapping[str, Any] = {
    "prepare": Prepared,
    "correct": Trained,
    "score": Scored,
    "search": Searched,
    "prune": Pruned,
    "distill": Trained,
    "baseline": Trained,
    "evaluate": Evaluated,
    "export": Exported,
}
"""Stage -> type of its result."""
