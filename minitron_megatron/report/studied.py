"""Results of a study as text: a table for the terminal and a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NotRequired

from rich.console import Group
from rich.text import Text
from typing_extensions import TypedDict

from .. import numbers
from .html import figure, section, whole_page
from .html import table as html_table
from .records import text_table

__all__ = [
    "ArmResult",
    "Compared",
    "Ranks",
    "StudyTable",
    "Verdict",
    "study_markdown",
    "study_notes",
    "study_page",
    "study_text",
]


class Compared(TypedDict):
    """An arm by one measure."""

    values: list[float | None]
    """By seed."""
    mean: float | None
    spread: float | None
    """The largest value minus the smallest."""
    difference: float | None
    """Mean over the seeds of the difference from the first arm; below 0: less than the first arm."""
    signs: tuple[int, int]
    """Seeds in which the arm is better than the first arm, and in which it is worse."""
    p: float | None
    """Two-sided sign test of these; None for the first arm, or without seeds that differ."""
    printed: float | None


class ArmResult(TypedDict):
    """Everything measured of an arm. Costs are counted from shapes and budgets, not measured."""

    arm: str
    parameters: int | None
    tokens: int
    """Training tokens of the model that the last measure names, and those of its teacher's correction."""
    flops: int
    """FLOPs of the arm alone, with nothing shared: correction, scoring, pruning, training."""
    teacher_flops: int
    """FLOPs of the teacher beside the student, part of `flops`."""
    measures: dict[str, Compared]
    curve: dict[int, float]
    """Training step -> validation loss, mean over the seeds."""


class Verdict(TypedDict):
    """Pairs of arms that the paper orders, by what the seeds say."""

    measure: str
    order: list[list[str]]
    holds: int
    """Pairs whose order holds in every seed."""
    reversed: int
    mixed: int


class Ranks(TypedDict):
    """Ranks of the arms during training; 1 is the lowest loss."""

    steps: list[int]
    """0: by the first measure, before training."""
    of: dict[str, list[int]]
    """Arm -> its rank at each step, by the mean loss over the seeds."""
    with_last: list[float]
    """Spearman's correlation of the ranks at each step with those at the last one; NaN where all losses are equal."""


class StudyTable(TypedDict):
    """Results of a study."""

    study: str
    title: str
    claim: str
    paper: str
    model: str
    model_hash: str
    seeds: list[int]
    measures: dict[str, str]
    arms: list[ArmResult]
    verdicts: list[Verdict]
    flips: list[str]
    """Pairs of arms whose order before training is reversed by it, and the step."""
    ranks: NotRequired[Ranks]
    """Only of studies that ask for them."""


COMPARED = ("arm", "mean", "spread", "vs first", "better:worse", "p", "paper")
DOTS = "A dot is a seed, the bar their mean; the dashed line is the first arm's mean."
RANKS = "rank of each arm by its mean loss: before training, and at each validation"
COSTS = ("arm", "parameters", "tokens", "FLOPs", "teacher's share")

Block = tuple[str, Sequence[str], list[list[str]]]
"""Title, columns and rows of a table."""


def _blocks(table: StudyTable) -> Iterator[Block]:
    """Yield a table per measure, without the columns that no arm fills, and one of costs."""
    for name, about in table["measures"].items():
        rows = [[arm["arm"], *_cells(arm["measures"][name])] for arm in table["arms"]]
        kept = [n for n in range(len(COMPARED)) if any(row[n] != numbers.ABSENT for row in rows)]
        yield f"{name}: {about}", [COMPARED[n] for n in kept], [[row[n] for n in kept] for row in rows]
    if ranks := table.get("ranks"):
        yield RANKS, ("arm", *(f"step {step}" if step else "before" for step in ranks["steps"])), _ranked(ranks)
    yield "cost of each arm alone, counted", COSTS, [_costs(arm) for arm in table["arms"]]


def _ranked(ranks: Ranks) -> list[list[str]]:
    last = ["correlation with the last", *(f"{each:.2f}" for each in ranks["with_last"])]
    return [*([name, *map(str, places)] for name, places in ranks["of"].items()), last]


def _cells(found: Compared) -> list[str]:
    better, worse = found["signs"]
    return [
        numbers.loss(found["mean"]),
        numbers.loss(found["spread"]),
        numbers.ABSENT if found["difference"] is None else f"{found['difference']:+.4f}",
        f"{better}:{worse}" if better + worse else numbers.ABSENT,
        numbers.ABSENT if found["p"] is None else f"{found['p']:.2f}",
        numbers.ABSENT if found["printed"] is None else f"{found['printed']:g}",
    ]


def _costs(arm: ArmResult) -> list[str]:
    share = f"{arm['teacher_flops'] / arm['flops']:.0%}" if arm["flops"] else numbers.ABSENT
    cost = numbers.count(arm["tokens"]), numbers.flops(arm["flops"])
    return [arm["arm"], numbers.count(arm["parameters"]), *cost, share]


def study_text(table: StudyTable) -> Group:
    """Return a study's results as tables for the terminal."""
    return Group(Text(table["title"], style="bold"), *(text_table(*block) for block in _blocks(table)))


def study_notes(table: StudyTable) -> list[str]:
    """Return what the results say about the paper's claim, a sentence each."""
    first, seeds = table["arms"][0]["arm"], len(table["seeds"])
    notes = [
        f"Mean and spread (largest minus smallest) over seeds {', '.join(map(str, table['seeds']))}. Differences are "
        f"paired by seed, from {first}; p is of a two-sided sign test, which {seeds} seeds cannot bring below "
        f"{2 ** (1 - seeds):.2g}. The teacher's share is its work beside the student."
    ]
    for verdict in table["verdicts"]:
        pairs = verdict["holds"] + verdict["reversed"] + verdict["mixed"]
        order = " < ".join(" | ".join(group) for group in verdict["order"])
        notes.append(
            f"The paper's order by {verdict['measure']}, best first: {order}. Pairs of arms: {pairs}. In this order in "
            f"every seed: {verdict['holds']}, in the reverse order in every seed: {verdict['reversed']}, neither: "
            f"{verdict['mixed']}."
        )
    return notes + [f"{sentence}." for sentence in table["flips"]]


def study_markdown(table: StudyTable, plot: str | None) -> str:
    """Return a study's results as a Markdown page. plot: the name of the plot beside it, if there is one."""
    parts: Sequence[str] = (
        f"# {table['title']}",
        f"{table['claim']} ({table['paper']})",
        f"Teacher: `{table['model']}`, hash `{table['model_hash'][:16]}`.",
        *(_markdown(*block) for block in _blocks(table)),
        "\n".join(f"* {note}" for note in study_notes(table)),
        f"![{table['title']}]({plot})" if plot else "",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def study_page(table: StudyTable, plot: Path) -> str:
    """Return a study's results as an HTML page that needs no other file. plot: its PNG."""
    made = f"Teacher: {table['model']}, hash {table['model_hash'][:16]}."
    notes = "".join(f"<li>{escape(note)}</li>" for note in study_notes(table))
    body = section("Arms", figure(plot, f"{table['title']}. {DOTS}") + f"<ul>{notes}</ul>")
    body += "".join(section(title, html_table(columns, rows)) for title, columns, rows in _blocks(table))
    return whole_page(table["title"], f"{table['claim']} ({table['paper']}) {made}", body)


def _markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])
