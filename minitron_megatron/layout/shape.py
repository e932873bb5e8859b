"""The numbers that fix every parameter's shape. No model, no process is needed to know them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from ..errors import ModelError

__all__ = ["VOCAB_MULTIPLE", "Shape"]

VOCAB_MULTIPLE = 128
"""The embedding is padded to this multiple whatever the layout, so that a padded row never depends on TP."""

ATTENTION = "self_attention"
MUST = ("layers", "hidden", "heads", "kv_groups", "head_dim", "vocab")
"""Sizes that every shape has."""


@dataclass(frozen=True)
class Shape:
    """The architecture of a decoder-only transformer, in units: layers, channels, neurons, heads, entries."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    tied: bool = False
    gated: bool = True
    """Whether the MLP has a gate beside `up` (SwiGLU)."""
    norm_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised, a head at a time."""
    experts: int = 0
    """Of each layer's mixture; 0: the MLP is dense. A mixture has no neurons on axis `ffn`."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    """Neurons of each expert."""
    shared_ffn: int = 0
    """Neurons of the experts that every token goes through, all together."""
    shared_gate: bool = False
    """Whether a gate weighs what the shared experts give."""

    def __post_init__(self) -> None:
        """Raise ModelError where these numbers make no model."""
        for field in fields(self):
            value, kind = getattr(self, field.name), bool if field.type == "bool" else int
            if type(value) is not kind:
                raise ModelError(f"{field.name} of a shape is {value!r}, which is no {kind.__name__}.")
            if value < (field.name in MUST):
                raise ModelError(f"{field.name} of a shape is {value}, too few.")
        if self.heads % self.kv_groups:
            raise ModelError(f"{self.heads} heads cannot be shared by {self.kv_groups} kv_groups of a shape.")
        if self.experts_per_token > self.experts:
            raise ModelError(f"a token cannot go to {self.experts_per_token} of {self.experts} experts.")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding in memory; exports hold `vocab` of them."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def sizes(self, *, padded: bool = True) -> dict[str, int]:
        """The size of every axis of the table's words."""
        return {
            "vocab": self.padded_vocab if padded else self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "kv_group": self.kv_groups,
            "q": self.heads // self.kv_groups,
            "head_dim": self.head_dim,
            "expert": self.experts,
            "expert_ffn": self.expert_ffn,
            "shared_ffn": self.shared_ffn,
            **({"gate": 1} if self.gated else {"gate": 0}),
        }

    def axis_size(self, axis: str) -> int:
        """The size of a public axis: `layers`, `hidden`, `ffn`, `heads`, `kv_groups`, `experts`, `expert_ffn`, ..."""
        return int(getattr(self, axis))

    def units(self, axis: str) -> int:
        """How many units an axis numbers in a layer: its size, of `expert_ffn` the neurons of all experts."""
        return self.expert_ffn * self.experts if axis == "expert_ffn" else self.axis_size(axis)

    def resized(self, **sizes: int) -> Shape:
        """The same architecture with other sizes on some public axes."""
        return replace(self, **sizes)  # type: ignore[arg-type]  # a public axis is an int field

    def names(self) -> Iterator[str]:
        """The global name of every parameter, layers numbered from 0; a tied output layer is not named twice."""
        norm = ("weight", "bias") if self.norm_bias else ("weight",)
        yield "embedding.word_embeddings.weight"
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}"
            yield from (f"{at}.input_layernorm.{leaf}" for leaf in norm)
            yield f"{at}.{ATTENTION}.linear_qkv.weight"
            if self.qkv_bias:
                yield f"{at}.{ATTENTION}.linear_qkv.bias"
            if self.qk_norm:
                yield from (f"{at}.{ATTENTION}.{which}_layernorm.weight" for which in ("q", "k"))
            yield f"{at}.{ATTENTION}.linear_proj.weight"
            yield from (f"{at}.pre_mlp_layernorm.{leaf}" for leaf in norm)
            yield from (f"{at}.mlp.{name}" for name in self._mlp_names())
        yield from (f"decoder.final_layernorm.{leaf}" for leaf in norm)
        if not self.tied:
            yield "output_layer.weight"

    def _mlp_names(self) -> Iterator[str]:
        linears = ("linear_fc1.weight", "linear_fc2.weight")
        if not self.experts:
            yield from linears
            return
        yield "router.weight"
        for expert in range(self.experts):
            yield from (f"experts.local_experts.{expert}.{linear}" for linear in linears)
        if self.shared_ffn:
            yield from (f"shared_experts.{linear}" for linear in linears)
            if self.shared_gate:
                yield "shared_experts.gate_weight"
