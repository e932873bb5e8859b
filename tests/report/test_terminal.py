"""Pictures of characters."""

from __future__ import annotations

from rich.console import Console

from minitron_megatron.report import front_table, memory_table
from minitron_megatron.report.terminal import bars
from tests.report.test_browser import search_table


def test_a_search_has_its_front_with_the_winner_at_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(front_table(search_table()))  # type: ignore[arg-type]
    lines = [line.rstrip() for line in capture.get().splitlines()]
    worst, best = (next(line for line in lines if f"ffn {ffn}" in line) for ffn in (16, 32))
    assert worst.split()[2:6] == ["160", "k", "3.0000", "█" * 24] and best.split()[2:] == [
        "320",
        "k",
        "1.0000",
        "winner",
    ]
    assert not any("ffn 24" in line for line in lines), "it is not Pareto-optimal"
    assert front_table(None) is None and front_table({"candidates": [], "costs": ["params"]}) is None


def test_bytes_are_bars_the_largest_first() -> None:
    lines = bars({"weights": 2 * 2**30, "optimizer": 8 * 2**30, "loss": 3, "nothing": 0}).splitlines()
    assert [line.split()[-1] for line in lines] == ["optimizer", "weights", "loss"]
    assert [line.count("█") for line in lines] == [24, 6, 0] and "8.00 GiB" in lines[0]


def test_bars_of_several_ranks_have_one_scale() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(memory_table("Memory", {"rank 0": {"weights": 2**30}, "rank 1": {"weights": 2**29}}))
    lines = [line.strip() for line in capture.get().splitlines()]
    assert [line.count("█") for line in lines if "█" in line] == [24, 12]
    assert "rank 1: 512 MiB" in lines
