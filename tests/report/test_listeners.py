"""Progress with and without a terminal; metrics across kills and resumes."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from minitron_megatron.events import Event
from minitron_megatron.report import MetricsFile, Progress, fan_out, read_metrics
from tests.limits import HANGS


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_fan_out_tells_each_listener_in_order() -> None:
    heard: list[tuple[str, int]] = []
    listener = fan_out(lambda event: heard.append(("a", event.done)), lambda event: heard.append(("b", event.done)))
    listener(Event("score", 1, 2))
    listener(Event("score", 2, 2))
    assert heard == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_off_the_terminal_lines_come_after_two_seconds_then_every_few_and_at_the_end() -> None:
    console, clock = plain(), Clock()
    with Progress(console, every_seconds=10.0, clock=clock) as progress:
        for done in range(1, 26):
            progress(Event("distill", done, 25, values={"loss": 2.0, "tokens_per_second": 5312.3}))
            clock.now += 1.0
    shown = lines(console)
    assert [line.split()[2] for line in shown] == ["3/25", "13/25", "23/25", "25/25"]
    assert "steps  5,312 tokens/s  loss 2.0000  12.0 s left" in shown[1]


def test_off_the_terminal_short_work_says_nothing() -> None:
    console, clock = plain(), Clock()
    with Progress(console, clock=clock) as progress:
        for label in ("import", "export"):
            for done in range(1, 5):
                progress(Event(label, done, 4, "tensors"))
                clock.now += 0.5
        progress(Event("evaluate", 1, 1, "models"))
    assert [line.split()[0] for line in lines(console)] == ["evaluate"]  # its duration is unknown


def test_what_was_done_before_counts_for_no_speed() -> None:
    """Resumed at step 1,000, at two seconds per step, ten more steps take twenty seconds."""
    console, clock = plain(), Clock()
    with Progress(console, every_seconds=0.0, clock=clock) as progress:
        for done in range(1000, 1011):
            progress(Event("distill", done, 1020))
            clock.now += 2.0
    assert "0.5 steps/s" in lines(console)[-1]
    assert "20.0 s left" in lines(console)[-1]


def test_bytes_have_units_that_a_person_reads() -> None:
    console, clock = plain(), Clock()
    with Progress(console, every_seconds=0.0, clock=clock) as progress:
        for megabytes in (0, 3, 6):
            progress(Event("prepare", megabytes << 20, 12 << 20, "bytes"))
            clock.now += 2.0
    assert "6.00 MiB of 12.0 MiB  1.50 MiB/s" in " ".join(lines(console)[-1].split("\n"))


def test_a_block_that_ends_early_shows_how_far_it_came() -> None:
    console, clock = plain(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress(console, clock=clock) as progress:
        for done in (1, 2, 3):
            progress(Event("distill", done, 25))
        raise KeyboardInterrupt
    assert [line.split()[2] for line in lines(console)] == ["3/25"]


def test_a_label_that_starts_over_is_shown_anew() -> None:
    console, clock = plain(), Clock()
    with Progress(console, clock=clock) as progress:
        for done in (1, 2, 1, 2):
            progress(Event("[bold]score", done, 2, "batches"))
            clock.now += 3.0
    assert [line.split()[0::2][:2] for line in lines(console)] == [["[bold]score", "2/2"]] * 2


def test_a_terminal_gets_one_bar_a_label() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Progress(console) as progress:
        for done in range(1, 9):
            progress(Event("score", done, 8, "batches"))
        for done in range(1, 6):
            progress(Event("distill", done, 200, values={"loss": 2.5}))
    last = console.file.getvalue().rsplit("\x1b[2K", 1)[-1].splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in last[:2]] == ["score", "distill"]
    assert "8/8 batches" in last[0]
    assert "5/200 steps" in last[1] and "loss 2.5000" in last[1]


def test_metrics_come_back_as_they_were_sent(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricsFile(path)
    assert not path.parent.exists(), "a run folder is not made before there is something to write"
    metrics(Event("import", 1, 50, "tensors"))
    assert not path.parent.exists(), "what measures nothing leaves no line"
    metrics(Event("distill", 1, 200, values={"loss": 2.5, "tokens": 4096}))
    metrics(Event("score", 1, 8, "batches", {"tokens": 7}))
    first, second = read_metrics(path)
    assert first.pop("time").endswith("+00:00")
    assert first == {"stage": "distill", "done": 1, "total": 200, "unit": "steps", "loss": 2.5, "tokens": 4096}
    assert second["unit"] == "batches" and "loss" not in second


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null(tmp_path: Path, lost: float) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path)(Event("distill", 1, 200, values={"loss": lost}))
    assert '"loss": null' in path.read_text()
    assert read_metrics(path)[0]["loss"] is None


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_skipped_and_cut_off_on_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path)(Event("distill", 1, 200, values={"loss": 2.0}))
    with path.open("a") as file:
        file.write('{"time": "2026-01-02T03:04:05+00:00", "stage": "dist')
    assert [line["done"] for line in read_metrics(path)] == [1]
    MetricsFile(path)(Event("distill", 2, 200, values={"loss": 1.0}))
    assert [json.loads(line)["done"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_resumed_stage_supersedes_its_own_later_lines_only(tmp_path: Path) -> None:
    """Killed after step 5, resumed from 2, stopped at 4: step 5 of the first attempt is dropped."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for stage, steps, attempt in (("correct", (1, 2, 3), 1), ("distill", (1, 2, 3, 4, 5), 1), ("distill", (3, 4), 2)):
        for done in steps:
            metrics(Event(stage, done, 5, values={"attempt": attempt}))
    seen = [(line["stage"], line["done"], line["attempt"]) for line in read_metrics(path)]
    assert seen == [("correct", n, 1) for n in (1, 2, 3)] + [("distill", n, 1 if n < 3 else 2) for n in (1, 2, 3, 4)]


WRITER = """
import itertools, pathlib, sys
from minitron_megatron.events import Event
from minitron_megatron.report import MetricsFile
metrics = MetricsFile(pathlib.Path(sys.argv[1]))
for done in itertools.count(1):
    metrics(Event("distill", done, 10**9, values={"loss": 1 / done}))
"""


def test_a_kill_loses_no_line_that_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
        deadline = time.monotonic() + HANGS
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    done = [line["done"] for line in read_metrics(path)]
    assert len(done) > 100
    assert done == list(range(1, len(done) + 1))
