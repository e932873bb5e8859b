"""Pruning plan: the kept global indices for each axis and layer, and the kept layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from typing_extensions import TypedDict

from ..errors import CheckpointError, PlanError
from ..files import read_as, write_json
from ..layout import PER_LAYER, WITHIN, Keep, Shape, expect_axis
from .shape import read_shape

__all__ = ["SAFE_MARGIN", "Plan"]

SAFE_MARGIN = 1e-5
"""Below this relative margin, another order of floating-point additions could choose another unit."""

T = TypeVar("T")

Indices = Mapping[str, Mapping[int | None, tuple[int, ...]]]


class _File(TypedDict):
    """JSON content of a plan file; layers are string keys."""

    shape: dict[str, object]
    keep: dict[str, dict[str, tuple[int, ...]]]
    layers: tuple[int, ...] | None
    margins: dict[str, dict[str, float | None]]
    model_hash: str


@dataclass(frozen=True)
class Plan:
    """Pruning plan for a model of `shape`, validated on construction.

    Raises PlanError for an unknown axis, indices out of range, unsorted or repeated, a layer without indices, sizes
    that differ between layers, and units spread unevenly over their groups (query heads over kv_groups, neurons over
    experts).
    """

    shape: Shape
    keep: Indices = field(default_factory=dict)
    """Axis -> layer (of the source; None: shared) -> kept indices, ascending. An axis that is absent is kept whole."""
    layers: tuple[int, ...] | None = None
    """Kept layers, ascending; None: all."""
    margins: Mapping[str, Mapping[int | None, float]] = field(default_factory=dict)
    """Axis -> layer -> relative margin of the cut: (score of the last kept unit - score of the first removed unit) /
    score of the last kept unit; the minimum over groups."""
    model_hash: str = ""
    """Hash of the scored model; empty where no scores were used."""

    def __post_init__(self) -> None:
        _check_indices("layers", self.kept_layers, self.shape.layers)
        for axis, by_layer in self.keep.items():
            expect_axis(axis)
            size = self.shape.units(axis)
            wanted: list[int | None] = list(self.kept_layers) if axis in PER_LAYER else [None]
            if sorted(by_layer, key=str) != sorted(wanted, key=str):
                raise PlanError(
                    f"axis {axis} must have kept indices for {_places(wanted)}, and has them for {_places(by_layer)}."
                )
            for kept in by_layer.values():
                _check_indices(axis, kept, size)
            if len({len(kept) for kept in by_layer.values()}) != 1:
                raise PlanError(
                    f"axis {axis} keeps different sizes in different layers. Keep the same number in every layer."
                )
        for axis in WITHIN.keys() & self.keep.keys():
            for layer, kept in self.keep[axis].items():
                self._check_groups(axis, layer, kept)
        for kept in self.keep.get("experts", {}).values():
            if len(kept) < self.shape.experts_per_token:
                raise PlanError(
                    f"axis experts keeps {len(kept)}, but every token is routed to {self.shape.experts_per_token}. "
                    "Keep at least as many."
                )

    def _check_groups(self, axis: str, layer: int | None, kept: tuple[int, ...]) -> None:
        groups, each = WITHIN[axis], self.shape.units(axis) // self.shape.axis_size(WITHIN[axis])
        counts = dict.fromkeys(self.kept_at(groups, layer), 0)
        for unit in kept:
            if unit // each not in counts:
                raise PlanError(
                    f"axis {axis} keeps unit {unit} of layer {layer}, but axis {groups} removes the unit that holds it."
                )
            counts[unit // each] += 1
        if len({*counts.values()}) != 1:
            raise PlanError(
                f"axis {axis} keeps {' or '.join(map(str, sorted({*counts.values()})))} units in different {groups}. "
                "Keep the same number in each."
            )

    @property
    def kept_layers(self) -> tuple[int, ...]:
        return tuple(range(self.shape.layers)) if self.layers is None else self.layers

    @property
    def target(self) -> Shape:
        """Shape of the pruned model."""
        sizes = {axis: len(next(iter(by_layer.values()))) for axis, by_layer in self.keep.items()}
        sizes = self.shape.with_heads(sizes)
        if "expert_ffn" in sizes:
            sizes["expert_ffn"] //= sizes.get("experts", self.shape.experts)
        return self.shape.resized(layers=len(self.kept_layers), **sizes)

    def kept_at(self, axis: str, layer: int | None) -> tuple[int, ...]:
        """Return the kept units of an axis in a source layer (None: on an axis that all layers share)."""
        if axis in self.keep:
            return self.keep[axis][layer]
        groups = WITHIN.get(axis, axis)
        if groups not in self.keep:
            return tuple(range(self.shape.units(axis)))
        each = self.shape.units(axis) // self.shape.axis_size(groups)
        return tuple(group * each + unit for group in self.keep[groups][layer] for unit in range(each))

    def keep_at(self, layer: int | None) -> Keep:
        """Return axis -> kept indices, int64 [kept], for parameters of a source layer (None: outside the layers)."""
        kept = {axis: by_layer.get(layer, by_layer.get(None)) for axis, by_layer in self.keep.items()}
        return {axis: torch.tensor(indices) for axis, indices in kept.items() if indices is not None}

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read JSON. Raises CheckpointError where the file does not hold a plan, PlanError where it is invalid."""
        try:
            raw = read_as(path, _File)
            shape = read_shape(raw["shape"], f"{path}: shape")
            keep = {axis: _by_layer(indices) for axis, indices in raw["keep"].items()}
            margins = {
                axis: {layer: _margin(value) for layer, value in _by_layer(values).items()}
                for axis, values in raw["margins"].items()
            }
        except ValueError as error:
            cause = str(error).rstrip(".")
            raise CheckpointError(f"{path} holds no plan ({cause}). Prune the model again.") from error
        try:
            return cls(shape, keep, raw["layers"], margins, raw["model_hash"])
        except PlanError as error:
            raise PlanError(f"{path}: {error} Prune the model again.") from error


def _by_layer(values: Mapping[str, T]) -> dict[int | None, T]:
    """Turn the string keys of JSON back into layers."""
    if wrong := [key for key in values if key != "null" and not key.isdecimal()]:
        raise ValueError(f"{wrong[0]!r} is not the number of a layer")
    return {None if key == "null" else int(key): value for key, value in values.items()}


def _margin(value: float | None) -> float:
    """Turn the null of JSON back into NaN."""
    return math.nan if value is None else value


def _places(layers: Iterable[int | None]) -> str:
    """Return the places of kept indices, for a message; None stands for all layers together."""
    return ", ".join("all layers together" if layer is None else f"layer {layer}" for layer in layers) or "none"


def _check_indices(axis: str, kept: tuple[int, ...], size: int) -> None:
    if not kept:
        raise PlanError(f"axis {axis} keeps nothing of {size} units. Keep at least one.")
    if list(kept) != sorted(set(kept)):
        raise PlanError(f"axis {axis}: kept indices must ascend without repeats.")
    if kept[0] < 0 or kept[-1] >= size:
        raise PlanError(f"axis {axis} keeps indices from {kept[0]} to {kept[-1]}. Valid ones run from 0 to {size - 1}.")
