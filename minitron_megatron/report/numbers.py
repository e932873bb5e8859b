"""Human-readable numbers. An absent number is a dash."""

from __future__ import annotations

import math

__all__ = ["ABSENT", "count", "duration", "loss", "perplexity"]

ABSENT = "-"
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(number: float | None) -> str:
    """Format a count: `12,345`, and from a hundred thousand on `131 k`, `2.90 M`, `8.03 B`."""
    if number is None:
        return ABSENT
    if abs(number) < 99_999.5 or not math.isfinite(number):
        return f"{number:,.0f}"
    scale, letter = next((scale, letter) for scale, letter in _SCALES if abs(number) >= 0.9995 * scale)
    scaled = number / scale
    return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {letter}"


def duration(seconds: float | None) -> str:
    """Format seconds: `4.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02d} {part_name}"
    return f"{whole} s"


def loss(nats: float | None) -> str:
    """Format a loss in nats, with four decimals."""
    return ABSENT if nats is None else f"{nats:.4f}"


def perplexity(number: float | None) -> str:
    """Format a perplexity: `16.97`, `3,172`, `1.2e+09`."""
    if number is None:
        return ABSENT
    return f"{number:.2f}" if number < 999.995 else f"{number:,.0f}" if number < 1e7 else f"{number:.1e}"
