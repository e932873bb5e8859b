"""The layout table: how each parameter is made of named axes, written once; everything else is derived from it.

Knows: names of Megatron-Core parameters, axes, sizes. Must not know: processes, modules, files.
"""

from .count import active_parameters, flops_per_token, kv_cache_bytes, parameters
from .param import Axis, Param, coords, words
from .shape import Shape
from .table import (
    PER_LAYER,
    PUBLIC_AXES,
    SIZED_AXES,
    TABLE,
    TP_AXES,
    WITHIN,
    Keep,
    axis_coords,
    expect_axis,
    expert_of,
    kept_rows,
    layer_of,
    lookup,
    markdown,
    pattern_of,
)

__all__ = [
    "PER_LAYER",
    "PUBLIC_AXES",
    "SIZED_AXES",
    "TABLE",
    "TP_AXES",
    "WITHIN",
    "Axis",
    "Keep",
    "Param",
    "Shape",
    "active_parameters",
    "axis_coords",
    "coords",
    "expect_axis",
    "expert_of",
    "flops_per_token",
    "kept_rows",
    "kv_cache_bytes",
    "layer_of",
    "lookup",
    "markdown",
    "parameters",
    "pattern_of",
    "words",
]
