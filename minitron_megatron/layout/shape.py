"""Architecture sizes that determine the shape of every parameter, known without a model or a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from ..errors import ModelError

__all__ = ["VOCAB_MULTIPLE", "Shape"]

VOCAB_MULTIPLE = 128
"""The embedding is padded to this multiple at every layout, so that the padded rows do not depend on TP."""

ATTENTION = "self_attention"
MUST = ("layers", "hidden", "heads", "kv_groups", "head_dim", "vocab")
"""Sizes that must be at least 1."""


@dataclass(frozen=True)
class Shape:
    """Architecture of a decoder-only transformer, in units: layers, channels, neurons, heads, vocabulary entries."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    tied: bool = False
    gated: bool = True
    """Whether the MLP has a gate projection besides `up` (SwiGLU)."""
    norm_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    experts: int = 0
    """Experts of each layer; 0: the MLP is dense. An MoE layer has no neurons on axis `ffn`."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    """Neurons of each expert."""
    shared_ffn: int = 0
    """Neurons of all shared experts together, which process every token."""
    shared_gate: bool = False
    """Whether a gate weights the output of the shared experts."""

    def differences(self, wanted: Shape) -> str:
        """Return the sizes that differ from those of `wanted`, for a message; empty if none does."""
        pairs = ((field.name, getattr(self, field.name), getattr(wanted, field.name)) for field in fields(self))
        return ", ".join(f"{name} {mine} instead of {other}" for name, mine, other in pairs if mine != other)

    def __post_init__(self) -> None:
        """Raise ModelError where the sizes do not describe a valid model."""
        for field in fields(self):
            value, kind = getattr(self, field.name), bool if field.type == "bool" else int
            if type(value) is not kind:
                wanted = "true or false" if kind is bool else "a whole number"
                raise ModelError(f"{field.name} of a shape is {value!r}. It must be {wanted}.")
            if value < (least := int(field.name in MUST)):
                raise ModelError(f"{field.name} of a shape is {value}. It must be at least {least}.")
        if self.heads % self.kv_groups:
            raise ModelError(f"{self.heads} heads of a shape are not a multiple of its {self.kv_groups} kv_groups.")
        if self.experts_per_token > self.experts:
            raise ModelError(
                f"experts_per_token of a shape is {self.experts_per_token}, but it has only {self.experts} experts."
            )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding in memory, padding included; an export holds `vocab` of them."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.kv_groups

    @property
    def multi_head(self) -> bool:
        """Whether each head has its own key and value: then heads and KV groups are cut together."""
        return self.heads == self.kv_groups

    def with_heads(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return `sizes` (public axis -> size) with heads, which follow from kv_groups where only these are given."""
        if "kv_groups" not in sizes:
            return dict(sizes)
        return {**sizes, "heads": sizes.get("heads", self.heads_per_group * sizes["kv_groups"])}

    def sizes(self, *, padded: bool = True) -> dict[str, int]:
        """Return the size of every axis that the table's words name."""
        return {
            "vocab": self.padded_vocab if padded else self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "kv_group": self.kv_groups,
            "q": self.heads_per_group,
            "head_dim": self.head_dim,
            "expert": self.experts,
            "expert_ffn": self.expert_ffn,
            "shared_ffn": self.shared_ffn,
            **({"gate": 1} if self.gated else {"gate": 0}),
        }

    def axis_size(self, axis: str) -> int:
        """Return the size of a public axis: `layers`, `hidden`, `ffn`, `heads`, `kv_groups`, `experts`, ..."""
        return int(getattr(self, axis))

    def units(self, axis: str) -> int:
        """Return the number of units of an axis per layer: its size; for `expert_ffn`, the neurons of all experts."""
        return self.expert_ffn * self.experts if axis == "expert_ffn" else self.axis_size(axis)

    def resized(self, **sizes: int) -> Shape:
        """Return the same architecture with other sizes on some public axes."""
        return replace(self, **sizes)  # type: ignore[arg-type]  # a public axis is an int field

    def names(self) -> Iterator[str]:
        """Yield the global name of every parameter, layers numbered from 0; a tied output layer is not repeated."""
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
