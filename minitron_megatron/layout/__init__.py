"""Which axis lies where in which parameter: said once, in a table, and everything else derived from it.

Knows: names of Megatron-Core parameters, axes, sizes. Must not know: processes, modules, files.
"""

from .count import flops_per_token, kv_cache_bytes, parameters
from .param import Axis, Param, coords
from .shape import Shape
from .table import PER_LAYER, PUBLIC_AXES, TABLE, Keep, axis_coords, kept_rows, layer_of, lookup, markdown

__all__ = [
    "PER_LAYER",
    "PUBLIC_AXES",
    "TABLE",
    "Axis",
    "Keep",
    "Param",
    "Shape",
    "axis_coords",
    "coords",
    "flops_per_token",
    "kept_rows",
    "kv_cache_bytes",
    "layer_of",
    "lookup",
    "markdown",
    "parameters",
]
