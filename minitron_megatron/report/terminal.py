"""Pictures of characters for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from .. import numbers
from .plots.search import COSTS
from .records import text_table
from .searched import SearchedCandidate, SearchTable

__all__ = ["bars", "front_table", "memory_table"]

BAR = 24
"""Characters of the longest bar."""


def bars(sizes: Mapping[str, int], most: int | None = None) -> str:
    """Return a line for each kind of bytes, the largest first: a bar, the bytes, the kind. Kinds of 0 are left out.

    most: bytes of the longest bar; by default the largest kind.
    """
    shown = sorted(((size, name) for name, size in sizes.items() if size), reverse=True)
    most = most or max((size for size, _ in shown), default=1)
    return "\n".join(f"{_bar(size / most) or '▏':<{BAR}} {numbers.size(size):>9} {name}" for size, name in shown)


def memory_table(title: str, ranks: Mapping[str, Mapping[str, int]]) -> Table:
    """Return a row for each name of ranks: their bytes by kind as bars, all on one scale, and the sum."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    most = max((size for sizes in ranks.values() for size in sizes.values()), default=1)
    for name, sizes in ranks.items():
        table.add_row(Text(f"{name}: {numbers.size(sum(sizes.values()))}\n{bars(sizes, most)}"), end_section=True)
    return table


def front_table(table: SearchTable | None) -> Table | None:
    """Return a search's Pareto-optimal candidates and its winner, by the first budgeted cost; None without any.

    Losses are those after light distillation, or after the cut where there is none; a bar is the loss above the least
    one of the table.
    """
    rows = table["candidates"] if table else []
    shown = [(row, loss) for row in rows if (row["front"] or row["winner"]) and (loss := _loss(row)) is not None]
    if not table or not shown:
        return None
    cost = table["costs"][0]
    name, write = COSTS[cost]
    least, most = min(loss for _, loss in shown), max(loss for _, loss in shown)
    room = (most - least) or 1.0
    found = [
        (row["name"], write(row["costs"][cost]), numbers.loss(loss), f"{_bar((loss - least) / room):<{BAR}}")
        for row, loss in sorted(shown, key=lambda each: each[0]["costs"][cost])
    ]
    winners = {row["name"] for row, _ in shown if row["winner"]}
    columns = ("candidate", name, "loss", "above the best", "")
    marked = [[*each, "winner" if each[0] in winners else ""] for each in found]
    return text_table("Pareto-optimal candidates", columns, marked)


def _loss(row: SearchedCandidate) -> float | None:
    return row["after_cut"] if row["loss"] is None else row["loss"]


def _bar(share: float) -> str:
    return "█" * round(BAR * share)
