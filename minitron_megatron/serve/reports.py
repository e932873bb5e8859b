"""JSON reports of servers' own benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import DataError

__all__ = ["block", "number", "read_report"]


def read_report(path: Path, tool: str, needs: str, kind: type | tuple[type, ...]) -> Mapping[str, object]:
    """Return a report. Raises DataError if it is not one: an object with the field `needs`, which is of a kind."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a report of {tool}: {error}. Remove it and run the benchmark again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get(needs), kind) or not raw[needs]:
        raise DataError(
            f"{path} is not a report of {tool}: it has no `{needs}`. Remove it and run the benchmark again."
        )
    return raw


def block(raw: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return an object inside a report; empty if there is none."""
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def number(block: Mapping[str, object], *names: str) -> float | None:
    """Return the first of some fields that is there; None if that is not a number."""
    values = [block[name] for name in names if name in block]
    return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)
