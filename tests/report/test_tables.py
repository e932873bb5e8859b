from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from minitron_megatron.report import print_summary
from minitron_megatron.report.tables import COLUMNS, cells


def test_cells_are_written_for_people() -> None:
    row = {
        "model": "student",
        "parameters": 3_912_704,
        "loss_nats_per_token": 2.80934,
        "perplexity": 16.6,
        "tokens": 65536,
        "seconds": 184.6,
    }
    assert cells(row) == ["student", "3.91 M", "2.8093", "16.60", "65,536", "3 min 05 s"]
    assert cells({"model": "student", "seconds": None}) == ["student", "-", "-", "-", "-", "-"]
    assert len(cells({})) == len(COLUMNS)


def test_a_narrow_terminal_shows_every_number_whole(summary: list[dict[str, Any]]) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_summary([*summary, {"model": "[red]trained from scratch"}], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("8.39 M", "2.7123", "15.06", "65,536", "12.1 s", "(nats/token)", "[red]trained"):
        assert word in text
    assert "…" not in text
