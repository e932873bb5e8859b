"""What machines do to a run: a rank stopped, a rank killed, a disk full. It ends, says why, and goes on to the numbers
of a run that nothing happened to."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from minitron_megatron.events import Event
from minitron_megatron.files import read_json
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import Watchdog
from tests.cli.test_commands import ENVIRONMENT, ROOT, call
from tests.recipe.conftest import material, recipe_file

__all__ = ["material", "recipe_file"]

Write = Callable[..., Path]
STEPS = {"tokens": 60 * 8 * 16, "global_batch": 8, "micro_batch": 2, "warmup_steps": 2, "lr": 5e-3, "save_every": 4}
SHORT = {"correct": None, "random_baseline": False, "distill": STEPS | {"validate_every": 60}}
OPTIONS = ("--set", "parallel.tp=2", "--set", "data.repeat=true", "--set", "hang_seconds=8")


@contextmanager
def begun(recipe: Path, ranks: int = 2) -> Iterator[subprocess.Popen[str]]:
    """A run at work; what is left of it is killed in the end."""
    command = [str(ROOT / "launch/local.sh"), str(ranks), "run", str(recipe), *OPTIONS]
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    run = subprocess.Popen(command, text=True, env=ENVIRONMENT, start_new_session=True, **pipes)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def until_saved(run: subprocess.Popen[str], out: Path) -> None:
    """Returns once a checkpoint of distillation is there."""
    until = time.monotonic() + 180
    while not list((out / "checkpoints").glob("*/step_*")):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def rank_of(run: subprocess.Popen[str], rank: int) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(run.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank) and "minitron_megatron" in " ".join(child.cmdline())
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_json(out / "summary.json")]


def test_a_stopped_and_a_killed_rank_end_the_run_and_cost_no_result(recipe_file: Write, tmp_path: Path) -> None:
    recipe = recipe_file(**SHORT)
    out = load_recipe(recipe).out
    with begun(recipe) as run:
        until_saved(run, out)
        stopped = rank_of(run, 1)
        stopped.send_signal(signal.SIGSTOP)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 76, said
    assert "no rank made progress for 8 s" in said
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    assert "train" in (out / "stacks" / "rank-0.txt").read_text()  # where the other one waited for it
    with begun(recipe) as run:
        before = max((out / "checkpoints").glob("*/step_*"))
        while max((out / "checkpoints").glob("*/step_*")) == before:
            assert run.poll() is None
            time.sleep(0.02)
        rank_of(run, 1).kill()
        run.communicate(timeout=120)
    assert run.returncode not in (0, 2)
    assert call("run", recipe, *OPTIONS, ranks=2).returncode == 0
    assert call("run", recipe, *OPTIONS, "--out", tmp_path / "calm", ranks=2).returncode == 0
    assert rows(out) == rows(tmp_path / "calm")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
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
    with begun(recipe) as run:
        until_saved(run, out)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        _, said = run.communicate(timeout=120)
    stacks = [path.read_text() for path in (out / "stacks").glob("*")]
    assert run.returncode == 2, "\n".join([said, *stacks])
    assert "Traceback" not in said
    assert "space" in said
    assert list((out / "checkpoints").glob("*/step_*"))
    ballast.unlink()
    assert "resume" in call("run", recipe, "--dry-run", *OPTIONS).stdout
    done = call("run", recipe, *OPTIONS, ranks=2)
    assert done.returncode == 0, done.stderr


def test_one_rank_that_tells_of_its_work_keeps_the_others_waiting(tmp_path: Path) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 1, 0.4, end=ended.append), Watchdog(tmp_path, 0, 0.4, end=ended.append) as busy:
        for step in range(8):
            busy._marked = -1e9  # as if a second had passed
            busy(Event("prepare", step, 8))
            time.sleep(0.15)
        assert not ended
        time.sleep(1.2)
    assert ended == [76, 76]
    assert "test_one_rank" in (tmp_path / "stacks" / "rank-1.txt").read_text()
