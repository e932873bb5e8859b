"""A model configuration with invalid constants is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minitron_megatron.errors import ModelError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig

SHAPE = Shape(layers=2, hidden=8, ffn=16, heads=4, kv_groups=2, head_dim=2, vocab=32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, each) for key in ("norm_eps", "rotary_base", "rotary_share") for each in (0, -1.0, math.nan, math.inf)],
        ("rotary_share", 1.5), ("rotary_base", True), ("init_std", math.nan), ("max_positions", 2.0), ("window", 0),
        ("window", True), ("activation", "gelu"), ("norm", "none"), ("rotary_base", None),
        ("rotary_scaling", {"rope_type": "linear", "factor": math.inf}),
    ],
)  # fmt: skip
def test_constants_that_make_no_model_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match="factor" if key == "rotary_scaling" else key):
        ModelConfig(SHAPE, **{key: value})


def test_a_function_that_is_not_known_names_those_that_are() -> None:
    for key, said in (
        ("norm", "norm of a model is 'none', which is not known. Use RMSNorm or LayerNorm."),
        ("activation", "activation of a model is 'none', which is not known. Use silu or relu2."),
    ):
        with pytest.raises(ModelError) as caught:
            ModelConfig(SHAPE, **{key: "none"})
        assert str(caught.value) == said


def test_the_longest_sequence_is_within_positions_and_window() -> None:
    configs = [ModelConfig(SHAPE, max_positions=64, window=window) for window in (None, 16, 64, 100)]
    assert [config.longest for config in configs] == [64, 16, 64, 64]
