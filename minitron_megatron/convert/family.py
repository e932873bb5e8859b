"""Description of a model family: Hugging Face's tensor names, config keys and functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layout import Shape, expert_of, layer_of, lookup, pattern_of
from .keys import DEFAULTS, DERIVED, Kind, Only

__all__ = ["WHOLE", "Family", "Keys", "Names"]

WHOLE = ""
"""Role of a Hugging Face tensor that is a whole Megatron parameter."""

Names = Mapping[str, Mapping[str, str]]
"""Megatron pattern -> role -> Hugging Face pattern. Roles with the same tensor are concatenated in it, in order."""

Keys = Mapping[str, tuple[str, ...]]
"""Field of `Shape` -> its keys in the config. Several keys must agree; exports write all of them."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str
    names: Names
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Shape` that are fixed by the family, not by its config."""
    functions: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that are fixed by the family, not by its config."""
    eps: str = "rms_norm_eps"
    """The config's key of the norm's epsilon."""
    keys: Keys = field(default_factory=lambda: {"ffn": ("intermediate_size",)})
    """Keys of sizes that not all families have, or that have other names elsewhere."""
    read: Mapping[str, Kind] = field(default_factory=dict)
    """Further keys that are read, besides the common ones (`READ`) and the sizes."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Defaults of absent keys that differ from `DEFAULTS` and `DERIVED`; `...`: the key is required."""
    nullable: tuple[str, ...] = ()
    """Keys of `DERIVED` that may be null, which then means the derived default."""
    only: Only = field(default_factory=dict)
    """Settings that change what the model computes, with their supported values; besides `ONLY`."""
    free: Mapping[str, tuple[Kind, str]] = field(default_factory=dict)
    """The family's own keys that change nothing; besides `FREE`."""
    rope: tuple[str, ...] = ("default", "linear", "llama3")
    """Supported rope types that its class applies in transformers 4.57 and 5."""
    strict: bool = True
    """Refuse unknown keys of its config."""
    norm_topk_prob: bool = True
    """Default of `norm_topk_prob`: whether router weights are normalised over a token's chosen experts."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Megatron pattern of a matrix -> Hugging Face pattern of a bias on its rows. Our model has no such bias: exports
    write zeros, and a folder whose bias is not zero is refused."""

    def default(self, key: str) -> Any:
        """Return the default of an absent key: a value, a function of other keys, or `...` for a required key."""
        return self.defaults.get(key, DEFAULTS.get(key, DERIVED.get(key, ...)))

    def hf_names(self, name: str) -> dict[str, str]:
        """Return role -> Hugging Face tensor, for a parameter's global Megatron name."""
        numbers = [str(number) for number in (layer_of(name), expert_of(name)) if number is not None]
        return {role: hf.replace("*", "{}").format(*numbers) for role, hf in self.names[pattern_of(name)].items()}

    def rows(self, name: str, sizes: Mapping[str, int]) -> dict[str, list[Tensor]]:
        """Return Hugging Face tensor -> the parameter rows that it holds, part by part: int64 [rows of the part]."""
        param = lookup(name)
        parts: dict[str, list[Tensor]] = {}
        for role, hf in self.hf_names(name).items():
            every = role == WHOLE
            rows = torch.arange(param.shape(sizes)[0]) if every else param.role_rows(0, role, sizes)
            parts.setdefault(hf, []).append(rows)
        return parts

    def shapes(self, name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of every Hugging Face tensor of a parameter."""
        for hf, parts in self.rows(name, sizes).items():
            yield hf, (sum(map(len, parts)), *lookup(name).shape(sizes)[1:])

    def tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of every Hugging Face tensor of a model of `shape`, in the order of the layers."""
        for name in shape.names():
            yield from self.shapes(name, shape.sizes(padded=False))

    def zeros_of(self, name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of the `zeros` tensor of a parameter, if there is one."""
        if hf := self.zeros.get(pattern_of(name)):
            yield hf.replace("*", str(layer_of(name))), lookup(name).shape(sizes)[:1]

    def zero_tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of every `zeros` tensor, in the order of the layers."""
        for name in shape.names():
            yield from self.zeros_of(name, shape.sizes(padded=False))
