"""The summary of a run as a table: one row a model. The terminal and the page show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import numbers

__all__ = ["COLUMNS", "cells", "print_summary", "summary_table"]

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", str),
    "parameters": ("parameters", numbers.count),
    "loss_nats_per_token": ("loss (nats/token)", numbers.loss),
    "perplexity": ("perplexity", numbers.perplexity),
    "tokens": ("tokens", numbers.count),
    "seconds": ("time", numbers.duration),
}
"""Key of a row -> its title and how its value is written."""


def cells(row: Mapping[str, Any]) -> list[str]:
    """The row's values as text, in the order of `COLUMNS`; a dash for what is absent."""
    return [numbers.ABSENT if row.get(key) is None else write(row[key]) for key, (_, write) in COLUMNS.items()]


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `summary.json` as a table for the terminal."""
    table = Table(title="Models on the validation set", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for title, write in COLUMNS.values():
        text = write is str
        table.add_column(title.replace(" (", "\n("), justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        table.add_row(*map(Text, cells(row)))
    return table


def print_summary(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints the summary table."""
    (console or Console()).print(summary_table(rows))
