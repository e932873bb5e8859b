"""Synthetic run folders."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LAYERS, HIDDEN, FFN, HEADS = 4, 32, 48, 8


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    """Return metrics of two stages with cross-entropy, one with KL divergence, and one without training."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for stage, steps, start, end in (
        ("correct", 40, 2.8, 2.6),
        ("distill", 120, 2.9, 0.2),
        ("baseline", 120, 5.6, 2.9),
    ):
        for done in range(1, steps + 1):
            loss = end + (start - end) * math.exp(-6 * done / steps) + noise.gauss(0, 0.03)
            line = {"time": "2026-01-02T03:04:05+00:00", "stage": stage, "done": done, "total": steps, "unit": "steps"}
            line |= {"loss": loss, "lr": 1e-4, "tokens": 4096 * done, "tokens_per_second": 5000.0 + done}
            lines.append(line | ({"validation_loss": loss + 2.0} if done % 20 == 0 else {}))
    lines.append({"stage": "score", "done": 8, "total": 8, "unit": "batches", "loss": 2.7, "tokens": 16384})
    return lines


@pytest.fixture
def summary() -> list[dict[str, Any]]:
    rows = [("teacher", 8_390_656, 2.7123), ("pruned", 3_912_704, 4.9154), ("distilled", 3_912_704, 2.8093)]
    return [
        {
            "model": model,
            "parameters": parameters,
            "loss_nats_per_token": loss,
            "perplexity": math.exp(loss),
            "tokens": 65536,
            "seconds": 12.1,
        }
        for model, parameters, loss in rows
    ]


@pytest.fixture
def scores() -> dict[str, dict[int | None, list[float]]]:
    chance = random.Random(1)

    def units(size: int) -> list[float]:
        return [math.exp(chance.gauss(0, 1)) for _ in range(size)]

    return {
        "layers": {None: units(LAYERS)},
        "hidden": {None: units(HIDDEN)},
        "ffn": {layer: units(FFN) for layer in range(LAYERS)},
        "heads": {layer: units(HEADS) for layer in range(LAYERS)},
    }


@pytest.fixture
def plan(scores: dict[str, dict[int | None, list[float]]]) -> dict[str, dict[int | None, list[int]]]:
    """Return a plan: the best half of ffn and hidden, the even heads, all layers but layer 2."""

    def best(values: list[float], keep: int) -> list[int]:
        return sorted(sorted(range(len(values)), key=lambda unit: -values[unit])[:keep])

    return {
        "layers": {None: [0, 1, 3]},
        "hidden": {None: best(scores["hidden"][None], HIDDEN // 2)},
        "ffn": {layer: best(scores["ffn"][layer], FFN // 2) for layer in (0, 1, 3)},
        "heads": {layer: list(range(0, HEADS, 2)) for layer in (0, 1, 3)},
    }


@pytest.fixture
def margins() -> dict[str, dict[int | None, float]]:
    return {"hidden": {None: 0.02}, "ffn": {0: 1e-3, 1: 4.2e-7, 3: 0.0}, "heads": {0: 0.5, 1: math.inf, 3: 0.1}}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect every figure drawn in a test."""
    from minitron_megatron.report.plots import cuts, depth, losses, scores, search, style, throughput

    drawn: list[Any] = []

    @contextmanager
    def recorded(path: Path, width: float, height: float) -> Iterator[Any]:
        with style.new_figure(path, width, height) as figure:
            drawn.append(figure)
            yield figure

    for module in (cuts, depth, losses, scores, search, throughput):
        monkeypatch.setattr(module, "new_figure", recorded)
    return drawn
