"""State of a run by its records: steps, rates and times left by the records' own times, and how it ended."""

from __future__ import annotations

import io
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.errors import CheckpointError, Preempted, RecipeError
from minitron_megatron.files import read_json, write_json
from minitron_megatron.report import describe, watch
from minitron_megatron.report.progress_table import run_state
from minitron_megatron.run.status import StatusFile
from minitron_megatron.run_folder import RunFolder

BEGAN = 1_700_000_000.0
STAGES = {"prepare": "done", "prune": "ran", "distill": "running", "export": "waiting"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Run at work in `distill`: since it began, a step of 100 tokens each 2 seconds."""
    (tmp_path / "recipe.yaml").write_text("")
    sources = {"a": {"tokens": 900, "validation_tokens": 90}}
    write_json(tmp_path / "stages" / "prepare.json", {"seconds": 3.0, "result": {"sources": sources}})
    write_json(tmp_path / "stages" / "prune.json", {"seconds": 1.0, "result": {"layers": [0], "rounds": [{"ffn": 8}]}})
    state(tmp_path)
    old = [(step, BEGAN - 9000 + step) for step in range(1, 5)]  # of an interrupted command
    lines = [*old, *((step, BEGAN + 2 * step) for step in range(5, 9))]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, at in lines:
            line = {"time": datetime.fromtimestamp(at, UTC).isoformat(), "stage": "distill", "done": step, "total": 20}
            line |= {"unit": "steps", "loss": 1.0 / step, "tokens": 100 * step}
            file.write(json.dumps(line) + "\n")
    return tmp_path


def state(run: Path, **changes: Any) -> None:
    here = {"host": socket.gethostname(), "process": os.getpid()}
    status = {"stages": STAGES, "since": BEGAN, "ended": False, "why": ""} | here | changes
    write_json(run / "status.json", status)


def test_the_stage_at_work_has_its_step_loss_rate_and_time_left(run: Path) -> None:
    rows = {row[0]: row[1:] for row in run_state(run, BEGAN + 100).rows}
    assert rows == {
        "prepare": ("done", "900 tokens, and 90 held out", "", "3.0 s"),
        "prune": ("done", "kept layers 1, ffn 8", "", "1.0 s"),
        "distill": ("running", "8 of 20 steps, loss 0.1250", "50 tokens/s", "24.0 s left"),
        "export": ("waiting", "", "", ""),
    }


def test_a_stage_without_measurements_tells_how_long_it_has_been_at_work(run: Path) -> None:
    state(run, since=BEGAN + 50)
    assert run_state(run, BEGAN + 60).rows[2] == ("distill", "running", "", "", "10.0 s so far")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": {"prepare": "ran"}, "ended": True, "since": BEGAN + 99}, "Done."),
        (
            {"stages": {"distill": "stopped"}, "ended": True, "why": "the loss is not finite", "since": BEGAN + 99},
            "Stopped in distill: the loss is not finite. Run the same command again to resume.",
        ),
        ({"process": 2**22 + 1}, "Stopped in distill: its process is gone (killed?). Run the same command again"),
        ({"process": 2**22 + 1, "host": "elsewhere"}, "No progress yet."),
    ],
)
def test_how_it_ended(run: Path, changes: dict[str, Any], says: str) -> None:
    state(run, **changes)
    found = run_state(run, BEGAN + 100)
    assert found.sentence.startswith(says)
    assert found.over is ("progress" not in says)
    assert ("running" in {row[1] for row in found.rows}) is not found.over


def test_a_stopped_stage_tells_how_far_it_came(run: Path) -> None:
    state(run, ended=True, stages=STAGES | {"distill": "stopped"}, why="it was interrupted", since=BEGAN + 99)
    assert run_state(run, BEGAN + 100).rows[2][:3] == ("distill", "stopped", "8 of 20 steps, loss 0.1250")


def test_tasks_of_a_search_are_at_work_after_the_last_command(run: Path) -> None:
    state(run, ended=True, stages={"prepare": "done"})
    found = run_state(run, BEGAN + 100)
    assert found.rows[-1][:3] == ("distill", "running", "8 of 20 steps, loss 0.1250") and not found.over


def test_watch_follows_to_the_end_and_breaks_no_number(run: Path) -> None:
    live = {"force_terminal": True, "force_interactive": True}
    console = Console(file=io.StringIO(), width=80, height=40, color_system=None, **live)  # type: ignore[arg-type]
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        state(run, ended=True, stages=dict.fromkeys(STAGES, "ran"), since=BEGAN + 99)

    watch(run, console, clock=lambda: BEGAN + 100, sleep=sleep)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert waited == [1.0]
    assert "8 of 20 steps, loss 0.1250 50 tokens/s 24.0 s left" in " ".join(said.split())
    assert "Done." in said.splitlines()[-2]
    Console(file=(plain := io.StringIO()), width=80).print(describe(run))
    assert "900 tokens, and 90 held out" in plain.getvalue()
    with pytest.raises(CheckpointError, match="not a run folder"):
        watch(run / "stages", console)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, ""),
        (RecipeError("the budget is too small. Raise it."), "the budget is too small. Raise it"),
        (Preempted(), "the scheduler sent a signal"),
        (KeyboardInterrupt(), "it was interrupted"),
        (OSError("no"), "OSError: no"),
    ],
)
def test_a_command_writes_how_it_ended(tmp_path: Path, error: BaseException | None, why: str) -> None:
    try:
        with StatusFile(RunFolder(tmp_path), ["prepare", "score"], writes=True) as status:
            status.set("prepare", "running")
            assert not read_json(tmp_path / "status.json")["ended"]
            if error:
                raise error
            status.set("prepare", "ran")
    except BaseException as raised:
        assert raised is error
    found = read_json(tmp_path / "status.json")
    assert found["ended"] and found["why"] == why
    assert found["stages"] == {"prepare": "stopped" if error else "ran", "score": "waiting"}
