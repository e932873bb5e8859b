"""Importance of layers: what a metric says of the network without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import read_json, write_json
from ..layout import Shape

__all__ = ["DepthScores"]


@dataclass(frozen=True)
class DepthScores:
    """What a depth sweep over a calibration set found: the better a block's value, the less its layers matter."""

    shape: Shape
    """Of the model that was measured."""
    metric: str
    """`bi` (block importance, no unit), `loss` or `kl` (nats per token), or the name of a caller's own metric."""
    lower_is_better: bool
    baseline: float
    """The metric with every layer in its place."""
    blocks: Mapping[tuple[int, int], float]
    """(first layer, how many) -> the metric with that block left out, or its block importance."""
    greedy: tuple[tuple[int, float], ...] = ()
    """Layers taken one by one, each the best to lose after those before it; and the metric once it is gone."""
    samples: int = 0
    tokens: int = 0
    model_hash: str = ""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the blocks that were measured, ascending."""
        return tuple(sorted({length for _, length in self.blocks}))

    def of_length(self, length: int) -> dict[int, float]:
        """First layer -> value of the blocks of one length, first layers ascending."""
        return {first: value for (first, n), value in sorted(self.blocks.items()) if n == length}

    def save(self, path: Path) -> None:
        """Writes JSON."""
        blocks = [[first, length, value] for (first, length), value in sorted(self.blocks.items())]
        write_json(path, {**vars(self), "shape": asdict(self.shape), "blocks": blocks})

    @classmethod
    def load(cls, path: Path) -> DepthScores:
        """Raises CheckpointError where the file is missing, torn or holds no depth scores."""
        try:
            raw = read_json(path)
            blocks = {(int(first), int(length)): float(value) for first, length, value in raw["blocks"]}
            greedy = tuple((int(layer), float(value)) for layer, value in raw["greedy"])
            return cls(**{**raw, "shape": Shape(**raw["shape"]), "blocks": blocks, "greedy": greedy})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no depth scores ({error}). Run `minitron score` again.") from error
