"""The layout table: the named axes of every parameter of the model. A parameter without a row is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import LayoutError, PlanError, did_you_mean
from .param import ABSENT, Param, coords

__all__ = [
    "PUBLIC_AXES",
    "TABLE",
    "WITHIN",
    "Keep",
    "axis_coords",
    "expect_axis",
    "expert_of",
    "kept_rows",
    "lookup",
    "markdown",
    "pattern_of",
]


def P(dims: str, tp: str | None = None) -> Param:
    return Param(tuple(dim.strip() for dim in dims.split(",")), tp)


LAYER = "decoder.layers.*."
EXPERT = LAYER + "mlp.experts.local_experts.*."
TABLE: Mapping[str, Param] = {
    "embedding.word_embeddings.weight": P("vocab, hidden", tp="vocab"),
    LAYER + "input_layernorm.weight": P("hidden"),
    LAYER + "input_layernorm.bias": P("hidden"),
    LAYER + "self_attention.linear_qkv.weight": P("kv_group (q + k + v) head_dim, hidden", tp="kv_group"),
    LAYER + "self_attention.linear_qkv.bias": P("kv_group (q + k + v) head_dim", tp="kv_group"),
    LAYER + "self_attention.q_layernorm.weight": P("head_dim"),
    LAYER + "self_attention.k_layernorm.weight": P("head_dim"),
    LAYER + "self_attention.linear_proj.weight": P("hidden, kv_group q head_dim", tp="kv_group"),
    LAYER + "pre_mlp_layernorm.weight": P("hidden"),
    LAYER + "pre_mlp_layernorm.bias": P("hidden"),
    LAYER + "mlp.linear_fc1.weight": P("(gate + up) ffn, hidden", tp="ffn"),
    LAYER + "mlp.linear_fc2.weight": P("hidden, ffn", tp="ffn"),
    LAYER + "mlp.router.weight": P("expert, hidden"),
    EXPERT + "linear_fc1.weight": P("(gate + up) expert_ffn, hidden"),
    EXPERT + "linear_fc2.weight": P("hidden, expert_ffn"),
    LAYER + "mlp.shared_experts.linear_fc1.weight": P("(gate + up) shared_ffn, hidden", tp="shared_ffn"),
    LAYER + "mlp.shared_experts.linear_fc2.weight": P("hidden, shared_ffn", tp="shared_ffn"),
    LAYER + "mlp.shared_experts.gate_weight": P("one, hidden"),
    "decoder.final_layernorm.weight": P("hidden"),
    "decoder.final_layernorm.bias": P("hidden"),
    "output_layer.weight": P("vocab, hidden", tp="vocab"),
}
"""Parameter pattern -> its row. An ungated fc1 uses the same row with a `gate` of size 0. Each expert lies whole on one
rank: experts are split by EP, never by TP."""

PUBLIC_AXES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden",),
    "ffn": ("ffn",),
    "heads": ("kv_group", "q"),
    "kv_groups": ("kv_group",),
    "experts": ("expert",),
    "expert_ffn": ("expert", "expert_ffn"),
    "shared_ffn": ("shared_ffn",),
}
"""Public axis -> the words of the table whose product it is. An index on `heads` is kv_group * q_per_group + q."""

SIZED_AXES = ("layers", *PUBLIC_AXES)
"""The public axes, with the number of layers: all that pruning makes smaller."""

TP_AXES = tuple(axis for axis, made_of in PUBLIC_AXES.items() if made_of in {(row.tp,) for row in TABLE.values()})
"""The public axes that tensor parallelism splits."""

WITHIN: Mapping[str, str] = {"heads": "kv_groups", "expert_ffn": "experts"}
"""Axis -> the axis whose units contain its own. Every kept container keeps the same number of units; a removed
container loses all of its units."""

PER_LAYER = frozenset(PUBLIC_AXES) - {"hidden"}
"""Axes with a separate choice of units for each layer; `hidden` has one choice, because of the residual stream."""

Keep = Mapping[str, Int64[Tensor, "_kept"]]
"""Public axis -> the kept global indices, ascending. An axis that is absent is kept whole."""


def expect_axis(axis: str) -> None:
    """Raise PlanError for what is no public axis."""
    if axis not in PUBLIC_AXES:
        raise PlanError(
            f"axis {axis!r} is not known.{did_you_mean(axis, PUBLIC_AXES)} Known: {', '.join(PUBLIC_AXES)}."
        )


def pattern_of(name: str) -> str:
    """Return a parameter's global name with `*` for its layer and its expert: the key of its row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@cache
def lookup(name: str) -> Param:
    """Return the row for a parameter's global name. Raises LayoutError where the table has none."""
    pattern = pattern_of(name)
    if pattern not in TABLE:
        raise LayoutError(f"{name} has no row in the layout table. Add one to layout/table.py; see docs/layout.md.")
    return TABLE[pattern]


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter, from 0; None for the embedding, the final norm and the output layer."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def expert_of(name: str) -> int | None:
    """Return the index of a parameter's expert in its layer, from 0; None outside the experts."""
    found = re.search(r"\.local_experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def axis_coords(
    axis: str, dim: str, sizes: Mapping[str, int], expert: int | None = None
) -> Int64[Tensor, "rows"] | None:
    """Return the index of every row of `dim` on a public axis, -1 for a row that is not on the axis; None if no row is.

    expert: index of the expert that the parameter belongs to, if any.
    """
    at: Mapping[str, Tensor] = coords(dim, sizes)
    *outer, last = PUBLIC_AXES[axis]
    if last not in at:
        return None
    if expert is not None:
        at = {**at, "expert": torch.full_like(at[last], expert)}
    if any(word not in at for word in outer):
        return None
    index = torch.zeros_like(at[last])
    reached = torch.ones_like(index, dtype=torch.bool)
    for word in PUBLIC_AXES[axis]:
        index = index * sizes[word] + at[word]
        reached &= at[word] != ABSENT
    return torch.where(reached, index, ABSENT)


def kept_rows(
    param: Param, dim: int, sizes: Mapping[str, int], keep: Keep, expert: int | None = None
) -> Int64[Tensor, "kept_rows"]:
    """Return the rows of `dim` whose index is kept on every axis that they are on, in order.

    expert: index of the expert that the parameter belongs to, if any.
    """
    stays = torch.ones(param.shape(sizes)[dim], dtype=torch.bool)
    for axis, kept in keep.items():
        index = axis_coords(axis, param.dims[dim], sizes, expert)
        if index is not None:
            stays &= (index == ABSENT) | torch.isin(index, kept)
    return stays.nonzero().flatten()


def markdown(rows: Sequence[tuple[str, Param]] | None = None) -> str:
    """Return the table as Markdown, for docs/layout.md."""
    lines = ["| parameter | dims | split by TP |", "|---|---|---|"]
    for name, param in rows or tuple(TABLE.items()):
        lines.append(f"| `{name}` | `{', '.join(param.dims)}` | {param.tp or '-'} |")
    return "\n".join(lines) + "\n"
