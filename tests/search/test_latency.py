"""Latency by data sheet and by fit: work is counted by hand, known coefficients are recovered."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from minitron_megatron.errors import RecipeError
from minitron_megatron.layout import Shape, parameters
from minitron_megatron.search import Conditions, FittedSpeed, Roofline, SpeedRow

SHAPE = Shape(layers=4, hidden=64, ffn=128, heads=8, kv_groups=2, head_dim=8, vocab=100)


def test_a_roofline_is_bytes_over_bandwidth_or_flops_over_the_peak() -> None:
    at = Conditions(batch=4, context=10, weight_bytes=2, kv_bytes=2)
    read = (parameters(SHAPE) - 6400) * 2 + 2 * 4 * 2 * 8 * 4 * 10 * 2
    assert Roofline(1e6, 1e18)(SHAPE, at) == pytest.approx(read / 1e6)
    norms = (2 * SHAPE.layers + 1) * SHAPE.hidden
    matrices = parameters(SHAPE) - 6400 - norms  # the embedding lookup needs no FLOPs
    flops = 4 * (2 * matrices + 4 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim * 10)
    assert Roofline(1e18, 1e6)(SHAPE, at) == pytest.approx(flops / 1e6)
    with pytest.raises(RecipeError, match=r"H10.*Did you mean"):
        Roofline.of("H10")
    assert Roofline.of("H100").bytes_per_second == 3.35e12


def test_a_fit_finds_what_made_the_times_and_predicts_other_shapes() -> None:
    made = FittedSpeed({"step": 1e-3, "layers": 2e-4, "weights": 3e-10, "cache": 1e-10, "flops": 4e-12})
    draw, rows = random.Random(0), []
    for _ in range(30):
        shape = replace(SHAPE, layers=draw.randint(2, 12), hidden=64 * draw.randint(1, 8), ffn=64 * draw.randint(1, 9))
        at = Conditions(batch=draw.choice([1, 8, 64]), context=draw.choice([32, 256, 2048]))
        rows.append(SpeedRow(shape, at, made(shape, at)))
    fitted = FittedSpeed.to(rows[:20])
    for row in rows[20:]:
        assert fitted(row.shape, row.conditions) == pytest.approx(row.seconds, rel=1e-6)
    noisy = [replace(row, seconds=row.seconds * draw.uniform(0.8, 1.25)) for row in rows]
    assert min(FittedSpeed.to(noisy).coefficients.values()) >= 0


def test_one_model_says_nothing_of_others() -> None:
    rows = [SpeedRow(SHAPE, Conditions(batch=batch), 0.1) for batch in (1, 2)]
    with pytest.raises(RecipeError, match=r"^a table of speeds needs at least two models\. Measure more of them\.$"):
        FittedSpeed.to(rows)
