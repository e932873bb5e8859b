"""Human-readable numbers. An absent number is a dash; a unit never stands without a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["ABSENT", "count", "counted", "duration", "flops", "loss", "perplexity", "size", "tick"]

ABSENT = "-"
Scales = Sequence[tuple[float, str]]
_COUNTS: Scales = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES: Scales = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_FLOPS: Scales = [(10.0 ** (21 - 3 * place), f"{prefix}FLOP") for place, prefix in enumerate("ZEPTGMk")]


def count(number: float | None) -> str:
    """Format a count: `12,345`, and from a hundred thousand on `131 k`, `2.90 M`, `8.03 B`."""
    if number is None:
        return ABSENT
    if abs(number) < 99_999.5 or not math.isfinite(number):
        return f"{number:,.0f}"
    return _scaled(number, _COUNTS)


def tick(number: float, most: float) -> str:
    """Format a tick of an axis of counts up to `most`, in whose unit all its ticks are: `0`, `50 k`, `100 k`."""
    unit = next(((scale, name) for scale, name in _COUNTS if most >= scale), None)
    if unit is None or most < 99_999.5 or not number:
        return count(number)
    return f"{number / unit[0]:,.4g} {unit[1]}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a number of things: `1 layer`, `3 layers`, `2 matrices`. plural: where it is not the noun and an s."""
    return f"{count(number)} {noun if number == 1 else plural or f'{noun}s'}"


def size(in_bytes: float | None) -> str:
    """Format a number of bytes: `22 B`, `3.10 GiB`."""
    if in_bytes is None:
        return ABSENT
    return f"{in_bytes:.0f} B" if abs(in_bytes) < 1023.5 else _scaled(in_bytes, _BYTES)


def flops(number: float | None) -> str:
    """Format a number of floating-point operations: `2.20 GFLOP`, `94.0 ZFLOP`; add `/s` for a speed."""
    if number is None:
        return ABSENT
    return f"{number:.0f} FLOP" if abs(number) < 999.5 else _scaled(number, _FLOPS)


def _scaled(number: float, scales: Scales) -> str:
    """Return a number of at least about the least scale with three digits and the unit of its scale."""
    scale, unit = next(((scale, unit) for scale, unit in scales if abs(number) >= 0.9995 * scale), scales[-1])
    scaled = number / scale
    return f"{scaled:,.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {unit}"


def duration(seconds: float | None) -> str:
    """Format seconds: `under 0.1 s`, `4.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if 0 < seconds < 0.05:
        return "under 0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part:02d} {part_name}"
    return f"{whole} s"


def loss(nats: float | None) -> str:
    """Format a loss in nats, with four decimals."""
    return ABSENT if nats is None else f"{nats:.4f}"


def perplexity(number: float | None) -> str:
    """Format a perplexity: `16.97`, `3,172`, `1.2e+09`."""
    if number is None:
        return ABSENT
    return f"{number:.2f}" if number < 999.995 else f"{number:,.0f}" if number < 1e7 else f"{number:.1e}"
