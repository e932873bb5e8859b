"""Candidates of a search as table rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict

from .. import numbers

__all__ = [
    "ESTIMATED",
    "SEARCHED",
    "EstimatedCandidate",
    "SearchTable",
    "SearchedCandidate",
    "estimated_rows",
    "searched_rows",
]

Row = tuple[str, ...]

MOST = 20
"""Most rows of a table; the file has all candidates."""

SEARCHED = ("candidate", "parameters", "loss after\npruning", "loss after light\ndistillation", "")
ESTIMATED = ("candidate", "parameters", "memory", "compute\nper token", "decoding\nstep", "light\ndistillation")


class SearchedCandidate(TypedDict):
    name: str
    costs: dict[str, float]
    after_cut: float | None
    loss: float | None
    curve: dict[str, float | None]
    front: bool
    winner: bool
    sizes: NotRequired[dict[str, int]]
    layers: NotRequired[list[int] | None]
    score: NotRequired[float | None]


class EstimatedCandidate(TypedDict):
    """Row of `Estimate.candidate_rows`."""

    name: str
    costs: dict[str, float]
    hours: float


class SearchTable(TypedDict):
    """Contents of a run's `search/table.json`."""

    candidates: list[SearchedCandidate]
    by: NotRequired[str]
    costs: NotRequired[list[str]]
    settled: NotRequired[list[tuple[int, float | None]]]


def searched_rows(table: SearchTable | None) -> list[Row]:
    """Return rows with the columns `SEARCHED`: the best by their last loss, the winner, and the number of others."""
    rows = table["candidates"] if table else []
    shown: list[Row] = [
        (
            row["name"],
            numbers.count(row["costs"].get("params")),
            numbers.loss(row["after_cut"]),
            numbers.loss(row["loss"] if row["curve"] else None),
            "chosen" if row["winner"] else "Pareto-optimal" if row["front"] else "",
        )
        for place, row in enumerate(rows)
        if place < MOST or row["winner"]
    ]
    more = len(rows) - len(shown)
    return shown + ([(f"and {more} more", "", "", "", "")] if more else [])


def estimated_rows(candidates: Sequence[EstimatedCandidate]) -> list[Row]:
    """Return rows with the columns `ESTIMATED` from `Estimate.candidate_rows`."""

    def row(each: EstimatedCandidate) -> Row:
        costs = each["costs"]
        return (
            each["name"],
            numbers.count(costs["params"]),
            numbers.size(costs["memory_bytes"]),
            numbers.flops(costs["flops_per_token"]),
            f"{costs['decode_ms']:.3g} ms" if "decode_ms" in costs else numbers.ABSENT,
            numbers.duration(3600 * each["hours"]),
        )

    return [row(each) for each in candidates]
