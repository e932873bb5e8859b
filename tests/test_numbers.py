from __future__ import annotations

import math

import pytest

from minitron_megatron import numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (12_345, "12,345"),
        (99_999, "99,999"),
        (131_072, "131 k"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (2_902_784, "2.90 M"),
        (9_996_000, "10.0 M"),
        (123_456_789, "123 M"),
        (8_030_261_248, "8.03 B"),
        (94_000_000_000, "94.0 B"),
        (15e12, "15.0 T"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_counts(number: float | None, text: str) -> None:
    assert numbers.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.04, "under 0.1 s"),
        (4.23, "4.2 s"),
        (59.97, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7625, "2 h 07 min"),
        (86400 * 3 + 4 * 3600 + 59, "3 d 04 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("perplexity", "text"),
    [(None, "-"), (16.967, "16.97"), (999.996, "1,000"), (3172.4, "3,172"), (1.23e9, "1.2e+09"), (math.inf, "inf")],
)
def test_perplexities(perplexity: float | None, text: str) -> None:
    assert numbers.perplexity(perplexity) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (22, "22 B"), (1023.6, "1.00 KiB"), (3.1 * 2**30, "3.10 GiB"), (5000 * 2**40, "5,000 TiB")],
)
def test_sizes(number: float | None, text: str) -> None:
    assert numbers.size(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (12, "12 FLOP"), (2.2e9, "2.20 GFLOP"), (989e12, "989 TFLOP"), (6e24, "6,000 ZFLOP")],
)
def test_flops(number: float | None, text: str) -> None:
    assert numbers.flops(number) == text


def test_counted_things_agree_with_their_number() -> None:
    said = [numbers.counted(1, "layer"), numbers.counted(0, "layer"), numbers.counted(2, "matrix", "matrices")]
    assert said == ["1 layer", "0 layers", "2 matrices"]


def test_ticks_of_an_axis_have_one_unit() -> None:
    assert [numbers.tick(value, 200_000) for value in (0, 50_000, 100_000, 200_000)] == ["0", "50 k", "100 k", "200 k"]
    assert [numbers.tick(value, 1.5e6) for value in (500_000, 1_250_000)] == ["0.5 M", "1.25 M"]
    assert numbers.tick(50_000, 60_000) == "50,000"
