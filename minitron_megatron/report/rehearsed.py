"""Tables of a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .. import numbers
from .terminal import bars

__all__ = ["ASSUMED", "MODELLED", "PEAK", "rank_rows", "rehearsal_tables", "slowest", "whole_rows"]

RehearsalJson = Mapping[str, Any]
"""JSON of a rehearsal, or of one of its kinds of rank."""
MODELLED = "modelled, not measured"
ASSUMED, PEAK = "assumed", "at the step's peak"
"""Names of the rows with the longest texts."""


def rehearsal_tables(found: RehearsalJson) -> Iterator[Table]:
    """Yield the tables of a rehearsal's JSON: the whole, each kind of rank, and the costliest lines of the slowest."""
    yield _pairs(f"{found['stage']} on {found['gpus']} {found['gpu']} ({MODELLED})", whole_rows(found))
    for rank in found["ranks"]:
        yield _pairs(f"{rank['kind']}, rank {rank['rank']} ({MODELLED})", rank_rows(rank))
    slow = slowest(found)
    lines = {line: f"{1000 * seconds:,.1f} ms" for line, seconds in slow["costliest_lines"].items()}
    yield _pairs(f"costliest lines of {slow['kind']} ({MODELLED})", lines)


def slowest(found: RehearsalJson) -> RehearsalJson:
    """Return the kind of rank with the most modelled seconds."""
    ranks: list[RehearsalJson] = found["ranks"]
    return max(ranks, key=lambda each: sum(each["seconds"].values()))


def whole_rows(found: RehearsalJson) -> dict[str, str]:
    """Return what is modelled of the whole cluster, by name."""
    share, tokens = found["utilisation"], found["tokens_of_a_step"]
    rows: dict[str, str] = {}
    if share is not None:
        rows["step"] = f"{numbers.duration(found['seconds_of_a_step'])}, {numbers.count(tokens)} tokens"
    elif tokens:
        rows["tokens"] = numbers.count(tokens)
    if tokens:
        speeds = (found["tokens_per_second"], found["tokens_per_second_per_gpu"])
        rows["tokens per second"] = "{}, {} a GPU".format(*map(numbers.count, speeds))
    if share is not None:
        rows["utilisation"] = f"{share:.2f} of the bf16 peak"
    return rows | {"time": numbers.duration(3600 * found["hours"]), ASSUMED: found[MODELLED]}


def rank_rows(rank: RehearsalJson) -> dict[str, str]:
    """Return what is modelled of a kind of rank, by name."""
    sent = {
        name: f"{numbers.count(each['calls'])} x, {numbers.size(each['bytes'])}"
        for name, each in rank["communication"].items()
    }
    rows = {
        "peak memory": numbers.size(rank["peak_bytes"]),
        PEAK: bars(rank["peak_bytes_by_kind"]),
        "compute": f"{numbers.flops(rank['flops'])}, {numbers.count(rank['kernels'])} kernels",
        "bytes touched": numbers.size(rank["bytes_touched"]),
        "time by resource": ", ".join(f"{name} {numbers.duration(each)}" for name, each in rank["seconds"].items()),
        "host waits": numbers.count(sum(rank["host_waits"].values())),
    }
    return rows | sent


def _pairs(title: str, pairs: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name, text in pairs.items():
        table.add_row(Text(name), Text(text))
    return table
