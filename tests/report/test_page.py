"""The report shows all that a run folder has, and never fails."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.report import page, write_report


class Outline(HTMLParser):
    """Headings, images and text of a page; fails on unbalanced tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            told = dict(attrs)
            assert str(told["src"]).startswith("data:image/png;base64,")
            self.images.append(str(told["alt"]))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "li"):
            self.cells.append(data)


@pytest.fixture
def run(tmp_path: Path, metrics: list[dict[str, Any]], summary: list[dict[str, Any]]) -> Path:
    run = tmp_path / "quickstart"
    (run / "stages").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"time": "20')
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "versions.json").write_text(json.dumps({"torch": "2.13.0", "transformer-engine": None}))
    (run / "recipe.yaml").write_text("prune:\n  ffn: 24\n")
    (run / "stages" / "prune.json").write_text(json.dumps({"seconds": 1.1}))
    (run / "stages" / "distill.json").write_text(json.dumps({"seconds": 309.5}))
    return run


def outline(run: Path, **records: Any) -> Outline:
    path = write_report(run, **records)
    assert path == run / "report.html"
    return Outline(path.read_text(encoding="utf-8"))


def test_a_whole_run(run: Path, scores: Any, plan: Any, margins: Any) -> None:
    seen = outline(run, scores=scores, plan=plan, margins=margins)
    assert seen.headings == ["Warnings", "Models", "Training", "Pruning", "Stages", "Recipe", "Versions"]
    drawn = ("models", "losses", "importance", "shares", "margins")
    assert seen.images == [page.CAPTIONS[name] for name in drawn]
    assert all((run / "plots" / f"{name}.png").stat().st_size > 10_000 for name in drawn)
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("report")) == ["report.html"]
    assert str(run.parent) not in (run / "report.html").read_text()


def test_tables_hold_the_numbers(run: Path, plan: Any, margins: Any, scores: Any) -> None:
    text = (write_report(run, plan=plan, scores=scores, margins=margins)).read_text()
    kept = {at: sum(scores["ffn"][at][unit] for unit in units) for at, units in plan["ffn"].items()}
    shares = [share / sum(scores["ffn"][at]) for at, share in kept.items()]
    for row in (
        ("teacher", "8.39 M", "2.7123", "15.06", "65,536", "12.1 s"),
        ("ffn", "24", "48", f"{min(shares):.1%} to {max(shares):.1%}", "0.0e+00"),
        ("distill", "5 min 10 s", "120 steps", "492 k", "5,060"),
        ("prune", "1.1 s", "-", "-", "-"),
        ("all", "5 min 11 s", "", "", ""),
        ("transformer-engine", "-"),
    ):
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in text


def test_it_begins_with_what_became_of_the_teacher(run: Path) -> None:
    (run / "predicted.json").write_text(json.dumps({"model": "nvidia/teacher"}))
    os.utime(run / "summary.json", (1_800_000_000, 1_800_000_000))
    [lead] = re.findall('<p class="lead">(.*)</p>', write_report(run).read_text())
    said, day = lead.split(" Teacher: ")
    assert said == (
        "8.39 M parameters became 3.91 M (47%); the loss went from 2.7123 to 2.8093 (+0.097 nats per token), "
        "after 65,536 tokens of distillation."
    )
    assert re.fullmatch(r"nvidia/teacher\. 1[456] January 2027\.", day)  # by this machine's clock


def test_close_cuts_and_lost_losses_are_warned_of(run: Path, margins: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for done in (7, 8):
            file.write("\n" + json.dumps({"stage": "align", "done": done, "loss": None}) + "\n")
    cells = outline(run, margins=margins).cells
    assert [cell for cell in cells if cell.startswith("The cut of")] == [
        "The cut of ffn in layer 1 has a relative margin of 4.2e-07, below 1e-05: "
        "another parallel layout may keep different units.",
        "The cut of ffn in layer 3 has a relative margin of 0.0e+00, below 1e-05: "
        "another parallel layout may keep different units.",
    ]
    assert "The loss of align was not finite at step 7 and at 1 more steps." in cells


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    seen = outline(tmp_path)
    assert (seen.headings, seen.images) == ([], [])
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "versions.json", "recipe.yaml", "stages/prune.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[1, null]", b'"text"'])
def test_a_missing_or_torn_file_costs_its_own_part_only(
    run: Path, name: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_figure", lambda *_: "")
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    whole = {"Models", "Stages", "Recipe", "Versions"}
    part = {"summary.json": {"Models"}, "versions.json": {"Versions"}, "recipe.yaml": {"Recipe"}}
    assert whole - part.get(name, set()) <= set(outline(run).headings)


def test_everything_from_the_run_is_escaped(run: Path) -> None:
    evil = '<script>alert("x")</script>'
    (run / "summary.json").write_text(json.dumps([{"model": evil, "loss_nats_per_token": 2.0}]))
    (run / "recipe.yaml").write_text(evil + " $name $body")
    (run / "versions.json").write_text(json.dumps({evil: evil}))
    (run / "stages" / "a<b>.json").write_text(json.dumps({"seconds": 1}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"stage": evil, "done": 1, "loss": None}) + "\n")
    seen = outline(run, margins={evil: {None: 0.0}}, plan={evil: {None: [0]}})
    text = (run / "report.html").read_text()
    assert evil not in text and "<b>" not in text
    assert text.count("&lt;script&gt;") >= 7
    assert "$name $body" in text
    assert evil in seen.cells


def test_a_plot_that_fails_is_a_warning(run: Path, scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ImportError("no <matplotlib> here")

    monkeypatch.setattr(page.plots, "importance", broken)
    seen = outline(run, scores=scores)
    assert "The plot of importance could not be drawn: ImportError: no <matplotlib> here" in seen.cells
    assert seen.images == [page.CAPTIONS[name] for name in ("models", "losses")]


def test_a_report_that_fails_leaves_the_old_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run)
    old = (run / "report.html").read_text()

    def full(*_: str) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(page, "whole_page", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == old
    assert sorted(path.name for path in run.glob("report*")) == ["report.html"]
