"""Importance of layers: a metric of the network with blocks of layers left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import CheckpointError, FileError
from ..files import read_as, write_json
from ..layout import Shape
from .shape import read_shape

__all__ = ["DepthScores"]


@dataclass(frozen=True)
class _File:
    """JSON content of a depth scores file."""

    shape: dict[str, object]
    metric: str
    lower_is_better: bool
    baseline: float
    blocks: list[tuple[int, int, float]]
    greedy: list[tuple[int, float]]
    samples: int
    tokens: int
    model_hash: str
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (where pydantic looks for it)


@dataclass(frozen=True)
class DepthScores:
    """Results of a depth sweep over a calibration set. The better a block's value, the less its layers matter."""

    shape: Shape
    """Shape of the measured model."""
    metric: str
    """`bi` (block importance, no unit), `loss` or `kl` (nats per token), or the name of a caller's own metric."""
    lower_is_better: bool
    baseline: float
    """Metric of the complete network."""
    blocks: Mapping[tuple[int, int], float]
    """(first layer, number of layers) -> the metric with that block left out, or its block importance."""
    greedy: tuple[tuple[int, float], ...] = ()
    """(layer, metric after its removal), in the order of greedy removal: each layer is the best to remove after those
    before it."""
    samples: int = 0
    tokens: int = 0
    model_hash: str = ""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the measured blocks, ascending."""
        return tuple(sorted({length for _, length in self.blocks}))

    def of_length(self, length: int) -> dict[int, float]:
        """Return first layer -> value for the blocks of one length, first layers ascending."""
        return {first: value for (first, n), value in sorted(self.blocks.items()) if n == length}

    def save(self, path: Path) -> None:
        """Write JSON."""
        blocks = [[first, length, value] for (first, length), value in sorted(self.blocks.items())]
        write_json(path, {**vars(self), "shape": asdict(self.shape), "blocks": blocks})

    @classmethod
    def load(cls, path: Path) -> DepthScores:
        """Read JSON. Raises CheckpointError where the file is missing, damaged or does not hold depth scores."""
        try:
            raw = read_as(path, _File)
            shape = read_shape(raw.shape, f"{path}: shape")
            if any(first < 0 or length < 1 or first + length > shape.layers for first, length, _ in raw.blocks):
                raise FileError(f"{path}: a block lies outside of the model's {shape.layers} layers.")
            if any(not 0 <= layer < shape.layers for layer, _ in raw.greedy):
                raise FileError(f"{path}: greedy names a layer outside of the model's {shape.layers} layers.")
        except FileError as error:
            cause = str(error).rstrip(".")
            raise CheckpointError(f"{path} holds no depth scores ({cause}). Score the model again.") from error
        blocks = {(first, length): value for first, length, value in raw.blocks}
        return cls(**{**vars(raw), "shape": shape, "blocks": blocks, "greedy": tuple(raw.greedy)})
