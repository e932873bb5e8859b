from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from minitron_megatron.report import bench_tables, candidates_table, front_table, print_summary, text_table
from minitron_megatron.report.searched import SEARCHED, searched_rows
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


def at_80_columns(*tables: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_names_of_candidates_are_broken_after_dashes_only() -> None:
    name = "layers32-hidden4096-ffn14336-kv_groups8"
    costs = {"params": 8.03e9, "memory_bytes": 16e9, "flops_per_token": 15e12, "decode_ms": 123.4}
    row = {"name": name, "costs": costs, "after_cut": 5.2383, "loss": 5.0713, "curve": {"6": 5.0713}, "front": True}
    searched: Any = {"candidates": [row | {"winner": True}, row | {"winner": False}], "costs": ["params"]}
    shown = at_80_columns(
        candidates_table([{"name": name, "costs": costs, "hours": 12.3}], "predicted by formula"),
        text_table("Search", SEARCHED, searched_rows(searched)),
        front_table(searched),
    )
    for part in ("layers32-", "hidden4096-", "ffn14336-", "kv_groups8"):
        assert shown.count(part) == 5, shown
    for number in ("1 candidate (predicted by formula)", "8.03 B", "5.2383", "5.0713", "Pareto-optimal", "12 h 18 min"):
        assert number in shown


def test_a_benchmark_shows_what_was_measured_in_whole_words() -> None:
    row: dict[str, Any] = {"inputs": 1024, "outputs": 8192, "batch": 128, "ratio": 2.71, "ratio_batches": 4.36}
    speeds = {name: {"tokens_per_second": 123_456.7} for name in ("teacher", "student", "student fp8")}
    fp8 = {"ratio_fp8": 3.5, "ratio_batches_fp8": 5.25}
    shown = at_80_columns(*bench_tables([row | speeds | fp8]))  # type: ignore[list-item]
    for word in ("1,024", "8,192", "123 k", "student fp8", "2.71", "3.50", "4.36", "5.25", "fp8 largest"):
        assert word in shown
    assert "…" not in shown
    plain = at_80_columns(*bench_tables([row | {name: speeds[name] for name in ("teacher", "student")}]))  # type: ignore[list-item]
    assert "fp8" not in plain and "2.71" in plain
