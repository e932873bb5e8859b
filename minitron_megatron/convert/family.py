"""A model family: what Hugging Face calls each parameter, and what makes the family different."""

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
"""The role of a Hugging Face tensor that is all of a Megatron one."""

Names = Mapping[str, Mapping[str, str]]
"""Megatron pattern -> role -> Hugging Face pattern. Roles that name one tensor lie in it one after the other."""

Keys = Mapping[str, tuple[str, ...]]
"""Field of `Shape` -> the config's names for it, which must agree; all are written."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str
    names: Names
    shape: Mapping[str, Any] = field(default_factory=dict)
    """What its config does not say of `Shape`."""
    functions: Mapping[str, Any] = field(default_factory=dict)
    """What its config does not say of `ModelConfig`."""
    eps: str = "rms_norm_eps"
    """The config's key for the norm's epsilon."""
    keys: Keys = field(default_factory=lambda: {"ffn": ("intermediate_size",)})
    """How its config calls the sizes that not all families have, or call alike."""
    read: Mapping[str, Kind] = field(default_factory=dict)
    """Keys that its config has beyond the common ones and its sizes, and that are read."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What an absent key means where that differs from `DEFAULTS` and `DERIVED`; ...: it must be said."""
    nullable: tuple[str, ...] = ()
    """Keys of `DERIVED` whose null means what an absent one does in most families."""
    only: Only = field(default_factory=dict)
    """Settings that change the function, with the values that are supported, beside `ONLY`."""
    free: Mapping[str, tuple[Kind, str]] = field(default_factory=dict)
    """Keys of its own that change nothing, beside `FREE`."""
    rope: tuple[str, ...] = ("default", "linear", "llama3")
    """The kinds of rotary embedding that its class in transformers takes, of those that are known here."""
    strict: bool = True
    """Whether all keys of its config are known here."""
    norm_topk_prob: bool = True
    """Whether a token's experts are weighed among themselves, in a family whose config does not say."""
    zeros: Mapping[str, str] = field(default_factory=dict)
    """Megatron pattern of a matrix -> Hugging Face pattern of a bias on its rows. Its model here has no such bias: the
    tensor is written as zeros, and a folder where it is not zero is refused."""

    def default(self, key: str) -> Any:
        """The meaning of an absent key: a value, a function of other keys, or ... where it must be said."""
        return self.defaults.get(key, DEFAULTS.get(key, DERIVED.get(key, ...)))

    def hf_names(self, name: str) -> dict[str, str]:
        """role -> Hugging Face tensor, for a parameter's global Megatron name."""
        numbers = [str(number) for number in (layer_of(name), expert_of(name)) if number is not None]
        return {role: hf.replace("*", "{}").format(*numbers) for role, hf in self.names[pattern_of(name)].items()}

    def rows(self, name: str, sizes: Mapping[str, int]) -> dict[str, list[Tensor]]:
        """Hugging Face tensor -> the rows of a parameter that it is, part by part: int64 [rows of the part] each."""
        param = lookup(name)
        parts: dict[str, list[Tensor]] = {}
        for role, hf in self.hf_names(name).items():
            every = role == WHOLE
            rows = torch.arange(param.shape(sizes)[0]) if every else param.role_rows(0, role, sizes)
            parts.setdefault(hf, []).append(rows)
        return parts

    def shapes(self, name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of a parameter with its own shape."""
        for hf, parts in self.rows(name, sizes).items():
            yield hf, (sum(map(len, parts)), *lookup(name).shape(sizes)[1:])

    def tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of a shape with its own shape, in the order of the layers."""
        for name in shape.names():
            yield from self.shapes(name, shape.sizes(padded=False))

    def zeros_of(self, name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensor of `zeros` that goes with a parameter, with its own shape, where there is one."""
        if hf := self.zeros.get(pattern_of(name)):
            yield hf.replace("*", str(layer_of(name))), lookup(name).shape(sizes)[:1]

    def zero_tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of `zeros` with its own shape, in the order of the layers."""
        for name in shape.names():
            yield from self.zeros_of(name, shape.sizes(padded=False))
