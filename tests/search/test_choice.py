"""Rank correlation, Pareto fronts, knees and halving, against simple references."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from minitron_megatron.search import Curve, front, halving, knee, rank_correlation, rungs, settled


def test_rank_correlation_is_spearmans() -> None:
    """Without ties: 1 - 6 sum d^2 / n (n^2 - 1); with ties: Pearson's of mean ranks, a case worked by hand."""
    draw = random.Random(1)
    for n in (3, 10, 40):
        one, other = [draw.random() for _ in range(n)], [draw.random() for _ in range(n)]
        differences = [sorted(one).index(a) - sorted(other).index(b) for a, b in zip(one, other, strict=True)]
        expected = 1 - 6 * sum(d * d for d in differences) / (n * (n * n - 1))
        assert rank_correlation(one, other) == pytest.approx(expected)
        assert rank_correlation(one, [-each for each in one]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_settled_compares_each_step_with_the_last_among_those_that_reach_it() -> None:
    curves: dict[str, Curve] = {"a": {2: 3.0, 4: 1.0}, "b": {2: 2.0, 4: 2.0}, "c": {2: 1.0, 4: 3.0}, "out": {2: 9.0}}
    assert settled(curves) == [(2, pytest.approx(-1)), (4, pytest.approx(1))]
    assert settled({"a": {2: 1.0}}) == []


def test_the_front_holds_whom_no_other_beats_and_the_knee_is_on_it() -> None:
    draw = random.Random(2)
    points = {str(i): (draw.random(), draw.random(), draw.random()) for i in range(60)}
    found = front(points)
    beaten = {
        name
        for name, point in points.items()
        if any(all(a <= b for a, b in zip(o, point, strict=True)) and o != point for o in points.values())
    }
    assert set(found) == set(points) - beaten
    assert [points[name][0] for name in found] == sorted(points[name][0] for name in found)
    assert knee({"cheap": (9.0, 1.0), "bent": (2.0, 2.0), "good": (1.0, 9.0)}) == "bent"
    assert knee({"one": (1.0, 1.0)}) == "one"
    assert set(front({"a": (1.0, 2.0), "same": (1.0, 2.0)})) == {"a", "same"}


def test_rungs_halve_the_steps() -> None:
    assert rungs(400, 0) == [400]
    assert rungs(400, 2) == [100, 200, 400]
    assert rungs(3, 5) == [1, 3]


def test_halving_trains_half_of_the_rest_after_each_rung() -> None:
    trained: list[tuple[list[str], int]] = []
    losses = {"a": 4.0, "b": 1.0, "c": math.nan, "d": 2.0, "e": 3.0}

    def train_all(names: Sequence[str], until: int) -> Mapping[str, Curve]:
        trained.append((list(names), until))
        return {name: {step: losses[name] / step for step in range(1, until + 1)} for name in names}

    curves = halving(list(losses), [1, 2, 4], train_all)
    assert trained == [(["a", "b", "c", "d", "e"], 1), (["b", "d", "e"], 2), (["b", "d"], 4)]
    assert {name: max(curve) for name, curve in curves.items()} == {"a": 1, "b": 4, "c": 1, "d": 4, "e": 2}


def test_nothing_that_is_not_finite_is_best() -> None:
    points = {
        "lost": (math.nan, 1.0),
        "free": (3.0, -math.inf),
        "good": (1.0, 9.0),
        "bent": (2.0, 2.0),
        "cheap": (9.0, 1.0),
    }
    assert front(points) == ["good", "bent", "cheap"] and knee(points) == "bent"
    assert rank_correlation([1.0, 2.0, math.nan], [1.0, 2.0, 3.0]) == 1.0
