"""A shape with invalid sizes is refused."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_megatron.errors import ModelError
from minitron_megatron.layout import Shape

SIZES = {"layers": 2, "hidden": 8, "ffn": 16, "heads": 4, "kv_groups": 2, "head_dim": 2, "vocab": 32}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in ("layers", "hidden", "vocab") for value in (0, -1, 2.0, True, "2", None)],
        ("heads", float("nan")),
        ("kv_groups", 3), ("experts_per_token", 1), ("ffn", -1), ("tied", 1), ("gated", None),
    ],
)  # fmt: skip
def test_sizes_that_make_no_shape_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key.split("_per")[0].rstrip("s")):
        Shape(**(SIZES | {key: value}))
