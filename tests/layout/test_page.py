"""docs/layout.md is generated from the table."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.layout import markdown


def test_the_page_holds_the_table() -> None:
    assert markdown() in (Path(__file__).parents[2] / "docs" / "layout.md").read_text()
