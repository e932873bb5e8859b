"""Page of a rehearsal: its numbers, memory over time, and time by line of code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import numbers
from ..files import whole_file, write_json
from .html import figure, section, table, whole_page
from .plots.rehearsal import memory_over_time, time_by_line
from .rehearsed import ASSUMED, MODELLED, PEAK, RehearsalJson, rank_rows, slowest, whole_rows

__all__ = ["write_rehearsal"]

PAGE, NUMBERS = "rehearsal.html", "rehearsal.json"
LONG = (ASSUMED, PEAK)
"""Rows that the page says otherwise."""


def write_rehearsal(found: RehearsalJson, folder: Path) -> Path:
    """Write a rehearsal's detailed JSON, its plots and its page into a folder; return the page's path.

    Raises FileError if the folder cannot be written.
    """
    write_json(folder / NUMBERS, found)
    name = f"{found['stage']} on {found['gpus']} {found['gpu']}"
    slow = slowest(found)
    memory = memory_over_time(found["ranks"], found["memory_gib"], folder / "memory.png")
    time = time_by_line(slow["seconds_by_line"], folder / "time.png")
    body = section("The whole", _table(whole_rows(found)))
    if memory:
        body += section("Memory", figure(memory, "Bytes alive over the last step that was rehearsed, modelled."))
    if time:
        body += section("Time", figure(time, f"Seconds of a step of {slow['kind']} by line of code, modelled."))
    for rank in found["ranks"]:
        body += section(f"{rank['kind']}, rank {rank['rank']}", _table(rank_rows(rank) | _by_kind(rank)))
    with whole_file(folder / PAGE) as partial:
        partial.write_text(whole_page(name, found[MODELLED], body), encoding="utf-8")
    return folder / PAGE


def _table(rows: Mapping[str, str]) -> str:
    return table(["", MODELLED], ([name, text] for name, text in rows.items() if name not in LONG))


def _by_kind(rank: RehearsalJson) -> dict[str, str]:
    kinds: Mapping[str, float] = rank["peak_bytes_by_kind"]
    largest = sorted(kinds.items(), key=lambda each: -each[1])
    return {f"at the step's peak: {kind}": numbers.size(size) for kind, size in largest if size}
