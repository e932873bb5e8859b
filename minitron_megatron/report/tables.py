"""Tables of models, candidates and throughput. The terminal and the page show the same cells of the summary."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import numbers
from .plots import BenchRow
from .searched import ESTIMATED, EstimatedCandidate, estimated_rows

__all__ = [
    "COLUMNS",
    "at_dashes",
    "bench_tables",
    "candidates_table",
    "cells",
    "headline",
    "narrow_table",
    "print_summary",
    "student_of",
    "summary_table",
    "tasks_of",
]

SummaryRow = Mapping[str, Any]
"""Row of `summary.json`, or of a model that was measured apart from the run."""

RowT = TypeVar("RowT", bound=Mapping[str, Any])

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", str),
    "parameters": ("parameters", numbers.count),
    "loss_nats_per_token": ("loss (nats/token)", numbers.loss),
    "perplexity": ("perplexity", numbers.perplexity),
    "tokens": ("tokens", numbers.count),
    "seconds": ("time", numbers.duration),
}
"""Key of a row -> (column title, formatter)."""


def tasks_of(rows: Iterable[SummaryRow]) -> list[str]:
    """Return the tasks that any row has a score for, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.get("tasks") or ()))


def student_of(rows: Sequence[RowT]) -> RowT | None:
    """Return the row of the distilled student, which the loss on text measures; alignment aims at something else."""
    return next((row for row in rows if row.get("model") == "distilled"), None)


def headline(rows: Sequence[SummaryRow]) -> str:
    """Return a sentence on what became of the teacher; empty where a number of it is not there."""
    student = student_of(rows)
    if student is None:
        return ""
    keys = ("parameters", "loss_nats_per_token")
    size, loss, smaller, later = (row.get(key) for row in (rows[0], student) for key in keys)
    if size is None or loss is None or smaller is None or later is None:
        return ""
    return (
        f"{numbers.count(size)} parameters became {numbers.count(smaller)} ({smaller / size:.0%}); the loss went from "
        f"{numbers.loss(loss)} to {numbers.loss(later)} ({later - loss:+.3f} nats per token)"
        + (f", after {numbers.count(student['tokens'])} tokens of distillation." if student.get("tokens") else ".")
    )


def cells(row: SummaryRow, tasks: Sequence[str] = ()) -> list[str]:
    """Return the row's values as text, in the order of `COLUMNS` and then of `tasks`; a dash if absent."""
    plain = [numbers.ABSENT if row.get(key) is None else write(row[key]) for key, (_, write) in COLUMNS.items()]
    scores = row.get("tasks") or {}
    return plain + [numbers.ABSENT if scores.get(name) is None else f"{scores[name]:.4g}" for name in tasks]


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Return the rows of `summary.json` as a table for the terminal."""
    table = Table(title="Models on the validation set", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for title, write in COLUMNS.values():
        text = write is str
        table.add_column(title.replace(" (", "\n("), justify="left" if text else "right", no_wrap=not text)
    tasks = tasks_of(rows)
    for name in tasks:
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(*map(Text, cells(row, tasks)))
    return table


def print_summary(rows: Sequence[SummaryRow], console: Console | None = None) -> None:
    """Print the summary table."""
    (console or Console()).print(summary_table(rows))


def candidates_table(candidates: Sequence[EstimatedCandidate], origin: str) -> Table:
    """Return a table of a search's candidates and their costs. origin: where the numbers come from."""
    table = narrow_table(f"{numbers.counted(len(candidates), 'candidate')} ({origin})")
    for number, title in enumerate(ESTIMATED):
        table.add_column(title, justify="right" if number else "left", no_wrap=bool(number), overflow="fold")
    for row in estimated_rows(candidates):
        table.add_row(at_dashes(row[0]), *map(Text, row[1:]))
    return table


def narrow_table(title: str) -> Table:
    """Return a table whose columns stand close together, so that many fit 80 characters."""
    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )


NAME_WIDTH = 18
"""Most letters of a line of a candidate's name."""


def at_dashes(name: str) -> Text:
    """Return a name; one that is long and without spaces is broken after dashes only, so that its sizes stay whole."""
    lines = [""]
    for part in re.findall("[^-]*-|[^-]+$", name) if " " not in name and len(name) > NAME_WIDTH else [name]:
        if lines[-1] and len(lines[-1] + part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return Text("\n".join(lines))


RATIOS = {
    "ratio": "student\n/ teacher",
    "ratio_fp8": "fp8\n/ teacher",
    "ratio_batches": "largest batch\n/ teacher's\nsmallest",
    "ratio_batches_fp8": "fp8 largest\n/ teacher's\nsmallest",
}


def bench_tables(rows: Sequence[BenchRow]) -> list[Table]:
    """Return tables of `bench/table.json`, of what was measured: tokens per second of each model, and their ratios."""
    names = ("teacher", "student", "student fp8")
    speeds = [{name: row[name]["tokens_per_second"] for name in names if row.get(name)} for row in rows]
    tables = {
        "Tokens per second": (names, {name: name for name in names}, speeds, numbers.count),
        "Ratios of tokens per second": (tuple(RATIOS), RATIOS, rows, "{:.2f}".format),
    }
    return [
        table
        for title, (keys, titles, values, write) in tables.items()
        if (table := _workloads(title, rows, {titles[key]: [each.get(key) for each in values] for key in keys}, write))
    ]


def _workloads(
    title: str,
    rows: Sequence[BenchRow],
    columns: Mapping[str, Sequence[float | None]],
    write: Callable[[float], str],
) -> Table | None:
    """Return a table of the columns that have numbers, a row per workload; None if no column has any."""
    shown = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    if not shown:
        return None
    table = narrow_table(title)
    for name in ("input", "output", "batch", *shown):
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        sizes = [numbers.count(row[key]) for key in ("inputs", "outputs", "batch")]
        found = [values[place] for values in shown.values()]
        table.add_row(*sizes, *(numbers.ABSENT if value is None else write(value) for value in found))
    return table
