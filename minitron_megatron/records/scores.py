"""Importance scores: one number per unit, for each axis and layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..errors import CheckpointError, FileError
from ..files import check_as, whole_file
from ..layout import PER_LAYER, PUBLIC_AXES, Shape
from .shape import read_shape
from .statistic import Statistic

__all__ = ["Scores"]


class About(TypedDict):
    """Header of a scores file."""

    shape: dict[str, object]
    statistic: dict[str, str]
    samples: int
    tokens: int
    model_hash: str


Values = Mapping[str, Mapping[int | None, Tensor]]
"""Axis -> layer -> score of each unit: fp64 [units]. On an axis that all layers share, the layer is None."""


@dataclass(frozen=True)
class Scores:
    """Results of a scoring sweep over a calibration set."""

    values: Values
    shape: Shape
    """Shape of the scored model."""
    statistic: Statistic
    samples: int
    tokens: int
    model_hash: str

    def save(self, path: Path) -> None:
        """Write safetensors; the same scores give the same bytes."""
        from safetensors.torch import save_file

        tensors = {_key(axis, layer): value for axis, layers in self.values.items() for layer, value in layers.items()}
        about = {
            "shape": asdict(self.shape),
            "statistic": self.statistic.model_dump(),
            "samples": self.samples,
            "tokens": self.tokens,
            "model_hash": self.model_hash,
        }
        with whole_file(path) as partial:
            save_file(dict(sorted(tensors.items())), str(partial), {"scores": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read safetensors. Raises CheckpointError where the file is missing, damaged or no scores file, or where a
        score is not finite."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                raw = json.loads((file.metadata() or {})["scores"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            values: dict[str, dict[int | None, Tensor]] = {}
            for key in sorted(tensors, key=_order):
                axis, layer = _parse(key)
                values.setdefault(axis, {})[layer] = tensors[key].to(torch.float64)
            about = check_as(raw, About, "its header")
            shape = read_shape(about["shape"], "its header")
            _check_values(values, shape)
            statistic = Statistic.recorded(about["statistic"])
            return cls(values, shape, statistic, about["samples"], about["tokens"], about["model_hash"])
        except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
            cause = str(error).rstrip(".") or type(error).__name__
            raise CheckpointError(f"{path} holds no scores ({cause}). Score the model again.") from error


def _check_values(values: Values, shape: Shape) -> None:
    """Raise FileError for an axis or layer that a model of `shape` does not have, or scores that are not finite."""
    for axis, by_layer in values.items():
        for layer, units in by_layer.items():
            place = axis if layer is None else f"{axis} in layer {layer}"
            known = axis in PUBLIC_AXES and (layer is not None) == (axis in PER_LAYER)
            if not known or not (layer is None or 0 <= layer < shape.layers) or units.dim() != 1:
                raise FileError(f"{place} is not an axis of the model that the file names")
            if not bool(units.isfinite().all()):
                raise FileError(f"the scores of {place} are not all finite")


def _key(axis: str, layer: int | None) -> str:
    return axis if layer is None else f"{axis}.{layer}"


def _parse(key: str) -> tuple[str, int | None]:
    axis, _, layer = key.partition(".")
    return axis, int(layer) if layer else None


def _order(key: str) -> tuple[str, int]:
    axis, layer = _parse(key)
    return axis, -1 if layer is None else layer
