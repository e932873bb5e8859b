"""Model configuration beyond the shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import numbers
from ..errors import ModelError, TopologyError
from ..layout import TP_AXES, Shape
from ..parallel import Topology

__all__ = ["ACTIVATIONS", "HfConfig", "ModelConfig", "Recompute", "activation_name", "check_fits", "rotary_frequencies"]

HfConfig = Mapping[str, Any]
"""Keys of a Hugging Face `config.json`, or of a block in it, and their values."""

Recompute = Literal["none", "selective", "full"]
"""Activation recomputation in the backward pass: none, each layer's MLP or MoE, or each whole layer."""


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x) ** 2, Nemotron-4's activation function."""
    return F.relu(x).square()


NORMS = ("RMSNorm", "LayerNorm")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": squared_relu}


def activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """Return the name of the activation with the same values; there are several squared ReLUs. Raises ModelError."""
    x = torch.linspace(-4, 4, 65)
    for name, ours in ACTIVATIONS.items():
        if torch.allclose(function(x), ours(x)):
            return name
    shown = getattr(function, "__name__", repr(function))
    raise ModelError(f"activation_func={shown} is not one of {', '.join(ACTIVATIONS)}.")


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a decoder-only transformer: its shape and its other constants."""

    shape: Shape
    norm: str = "RMSNorm"
    """`RMSNorm`, or `LayerNorm` with a bias."""
    norm_eps: float = 1e-5
    zero_centered_norm: bool = False
    """Whether the stored norm weight is gamma - 1 (Nemotron's LayerNorm1p)."""
    router_pre_softmax: bool = False
    """Whether the router's softmax is over all experts (before top-k); otherwise over the selected ones."""
    activation: str = "silu"
    """`silu`, or `relu2`: squared ReLU."""
    rotary_base: float = 10000.0
    rotary_share: float = 1.0
    """Fraction of each head's channels that are rotated."""
    rotary_scaling: HfConfig | None = None
    """Hugging Face's `rope_scaling`: `rope_type` (`linear` or `llama3`) and its factors; None: no scaling."""
    max_positions: int = 2048
    window: int | None = None
    """Sliding window: number of tokens that a token attends to, including itself; None: all tokens before it."""
    init_std: float = 0.02
    source: HfConfig = field(default_factory=dict, compare=False)
    """Hugging Face config from which this was read; the export starts from it."""

    def __post_init__(self) -> None:
        """Raise ModelError where the constants do not describe a valid model."""
        constants = {name: getattr(self, name) for name in ("norm_eps", "rotary_base", "rotary_share", "init_std")}
        scaling = {key: value for key, value in (self.rotary_scaling or {}).items() if key not in ("rope_type", "type")}
        for name, value in {**constants, **scaling}.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "init_std"):
                raise ModelError(f"{name} of a model is {value!r}, which is not a finite number above 0.")
        if self.rotary_share > 1:
            raise ModelError(f"rotary_share of a model is {self.rotary_share}. It must be at most 1.")
        for name in ("max_positions", "window"):
            value = getattr(self, name)
            if not (name == "window" and value is None) and (type(value) is not int or value < 1):
                raise ModelError(f"{name} of a model is {value!r}, which is not a whole number above 0.")
        for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ModelError(f"{name} of a model is {value!r}, which is not known. Use {' or '.join(known)}.")

    @property
    def longest(self) -> int:
        """Longest sequence in tokens: the smaller one of `max_positions` and `window`."""
        return min(self.max_positions, self.window or self.max_positions)

    def resized(self, **sizes: int) -> ModelConfig:
        """Return the same configuration with other sizes on some public axes."""
        return replace(self, shape=self.shape.resized(**sizes))


def check_fits(shape: Shape, topology: Topology) -> None:
    """Raise TopologyError where a shape cannot be split over a layout; the message names the sizes of tp that fit."""
    topology.stages(shape.layers)
    _check_experts(shape, topology)
    sizes = {axis: shape.axis_size(axis) for axis in TP_AXES} | {"vocab": shape.padded_vocab}
    for axis, size in sizes.items():
        if size % topology.tp:
            fits = [str(tp) for tp in range(1, 9) if all(each % tp == 0 for each in sizes.values())]
            raise TopologyError(
                f"axis {axis} has {numbers.counted(size, 'unit')}, which cannot be split over TP={topology.tp}. "
                f"Run with TP {' or '.join(fits)}, or choose a multiple of {topology.tp}."
            )


def _check_experts(shape: Shape, topology: Topology) -> None:
    if topology.ep > 1 and not shape.experts:
        raise TopologyError(f"ep={topology.ep} spreads experts, and the model has none. Set ep to 1.")
    if shape.experts % topology.ep:
        fits = " or ".join(str(ep) for ep in range(1, topology.ep) if shape.experts % ep == 0)
        raise TopologyError(
            f"axis experts has {numbers.counted(shape.experts, 'unit')}, which cannot be split over EP={topology.ep}. "
            f"Run with EP {fits}, or choose a multiple of {topology.ep}."
        )
    if shape.experts and topology.tp > 1 and not topology.sequence_parallel:
        raise TopologyError("experts at tp of 2 or more need sequence parallelism. Set `sequence_parallel` to true.")


def pipeline_layout(layers: int, topology: Topology) -> list[list[str]] | None:
    """Return mcore's explicit layer placement, with which any number of layers fits any number of stages; None for one
    stage."""
    if topology.pp == 1:
        return None
    stages = [["decoder"] * len(stage) for stage in topology.stages(layers)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotary embedding's frequencies in radians per position: fp32 [rotated channels of a head / 2].

    Computed here because mcore 0.16 hard-codes Llama 3's low, high and original-length constants. Source: Llama 3.1
    reference code, as in transformers' `_compute_llama3_parameters`.
    """
    rotated = int(config.shape.head_dim * config.rotary_share)
    half = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / (config.rotary_base**half)
    scaling = dict(config.rotary_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies
