"""Faults of a run: a stopped rank, a killed rank, a full disk. The run ends, reports why, and resumes to the numbers of
an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from minitron_megatron.events import Event
from minitron_megatron.files import PARTIAL, read_json
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import Watchdog
from tests.cli.test_commands import ENVIRONMENT, ROOT, call
from tests.limits import HANGS
from tests.warm import warm

Write = Callable[..., Path]
STEPS = {"tokens": 24 * 8 * 16, "global_batch": 8, "micro_batch": 4, "warmup_steps": 2, "lr": 5e-3, "save_every": 4}
SHORT = {"correct": None, "random_baseline": False, "distill": STEPS | {"validate_every": 24}}
OPTIONS = ("--set", "parallel.tp=2", "--set", "data.repeat=true")


@contextmanager
def begun(recipe: Path, *more: str, environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[subprocess.Popen[str]]:
    """Start a run on two ranks; its remaining processes are killed at the end."""
    command = [str(ROOT / "launch/local.sh"), "2", "run", str(recipe), *OPTIONS, *more]
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    run = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def saved(out: Path) -> list[Path]:
    """Return the complete checkpoints of distillation, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("*/step_*") if path.suffix != PARTIAL)


def until_saved(run: subprocess.Popen[str], out: Path) -> None:
    """Wait for a new checkpoint."""
    before = saved(out)
    while saved(out)[-1:] == before[-1:]:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.02)


def said_by(run: subprocess.Popen[str]) -> str:
    """Wait for the process to end and return its output."""
    return run.communicate(timeout=HANGS)[1]


def rank_of(run: subprocess.Popen[str], rank: int) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(run.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank) and "minitron_megatron" in " ".join(child.cmdline())
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_json(out / "summary.json")]


def test_a_stopped_rank_a_killed_one_and_a_torn_checkpoint_cost_no_result(recipe_file: Write, tmp_path: Path) -> None:
    recipe = recipe_file(**SHORT)
    out, began = load_recipe(recipe).out, time.monotonic()
    calm = call("run", recipe, *OPTIONS, "--out", tmp_path / "calm", ranks=2)
    assert calm.returncode == 0, calm.stderr
    hang_seconds = max(12, round(time.monotonic() - began))  # no step takes longer than a whole run
    with begun(recipe, "--set", f"hang_seconds={hang_seconds}") as run:
        until_saved(run, out)
        stopped = rank_of(run, 1)
        stopped.send_signal(signal.SIGSTOP)
        said = said_by(run)
    assert run.returncode == 76, said
    assert f"no rank made progress for {hang_seconds} s" in said
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    assert "train" in (out / "stacks" / "rank-0.txt").read_text()  # it waited for the stopped rank
    with begun(recipe) as run:
        until_saved(run, out)
        rank_of(run, 1).kill()
        said_by(run)
    assert run.returncode not in (0, 2)
    older, newest = saved(out)
    weights = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    done = call("run", recipe, *OPTIONS, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from {older.name} instead" in done.stderr
    assert rows(out) == rows(tmp_path / "calm")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(recipe_file: Write, small_disk: Path) -> None:
    recipe = recipe_file(**SHORT | {"out": str(small_disk / "run")})
    out = small_disk / "run"
    with begun(recipe, environment=warm(ENVIRONMENT)) as run:
        until_saved(run, out)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        said = said_by(run)
    stacks = [path.read_text() for path in (out / "stacks").glob("*")]
    assert run.returncode == 2, "\n".join([said, *stacks])
    assert "Traceback" not in said
    assert "ake room" in said
    assert saved(out)
    ballast.unlink()
    assert "resume" in call("run", recipe, "--dry-run", *OPTIONS).stdout
    done = call("run", recipe, *OPTIONS, ranks=2)
    assert done.returncode == 0, done.stderr


def test_one_rank_that_tells_of_its_work_keeps_the_others_waiting(tmp_path: Path) -> None:
    ended: list[int] = []
    now = 0.0
    idle, busy = (Watchdog(tmp_path, rank, 10, end=ended.append, clock=lambda: now) for rank in (1, 0))
    for step in range(8):
        now += 9.0
        busy(Event("prepare", step, 8))
        os.utime(tmp_path / "heartbeat", (step, step))  # longer than the resolution of file times
        assert not idle.check() and not busy.check()
    now += 11.0
    assert idle.check() and busy.check()
    assert ended == [76, 76]
    assert "test_one_rank" in (tmp_path / "stacks" / "rank-1.txt").read_text()
