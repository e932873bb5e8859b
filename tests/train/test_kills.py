"""A run killed at any moment of writing a checkpoint resumes to the same numbers as an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import load_hf, model_hash
from minitron_megatron.parallel import Topology
from minitron_megatron.train import LMObjective, Saving, Training, train
from tests.limits import HANGS
from tests.tiny import samples, share

FORKS = get_context("forkserver")

TRAINING = Training(steps=8, lr=2e-3, min_lr=2e-4, warmup_steps=2, save_every=3, keep_checkpoints=1)
MOMENTS = {
    "first data": ("open", r"step_00000003\..*\.distcp", 1),
    "first name": ("os.rename", r"step_00000003\.\w+\.partial", 1),
    "second data": ("open", r"step_00000006\..*\.distcp", 4),
    "removal of the first": ("os.rmdir", r"step_00000003", 7),
}
"""Moments of the kill: before the first such operation on a path, and the step that the next run begins with."""

Line = list[Any]


def work(folder: Path, checkpoints: Path, log: Path, asynchronous: bool, moment: str | None) -> None:
    """Train, with a line in `log` for each step and one for the weights.

    Kill -9 this process at the moment, which may come in one of its writers.
    """
    import torch

    torch.set_num_threads(1)
    topology, main = Topology.start(), os.getpid()
    model = load_hf(folder, topology)
    operation, path, _ = MOMENTS[moment] if moment else ("", "", 0)
    matches = re.compile(f"{re.escape(str(checkpoints))}/{path}").fullmatch

    def watch(event: str, arguments: Any) -> None:
        if event == operation and matches(str(arguments[0])):
            os.kill(main, signal.SIGKILL)

    def note(*line: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    sys.addaudithook(watch)
    train(
        model,
        LMObjective(topology),
        lambda step: share(samples(8, seed=step), topology, 8),
        TRAINING.replaced(save_async=asynchronous),
        topology,
        saving=Saving(checkpoints),
        listener=lambda event: note(event.done, event.values["loss"], event.values["grad_norm"]),
    )
    note("weights", model_hash(model, topology))


def run(folder: Path, at: Path, asynchronous: bool, moment: str | None = None) -> int | None:
    process = FORKS.Process(target=work, args=(folder, at / "saved", at / "log", asynchronous, moment))
    process.start()
    process.join(HANGS)
    return process.exitcode


def lines(at: Path) -> list[Line]:
    return [json.loads(line) for line in (at / "log").read_text().splitlines()]


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Return the lines of a run that nobody killed."""
    at = tmp_path_factory.mktemp("whole")
    assert run(checkpoints["untied"], at, asynchronous=False) == 0
    return lines(at)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    checkpoints: dict[str, Path], truth: list[Line], tmp_path: Path, asynchronous: bool, moment: str
) -> None:
    assert run(checkpoints["untied"], tmp_path, asynchronous, moment) == -signal.SIGKILL
    before = lines(tmp_path)
    assert run(checkpoints["untied"], tmp_path, asynchronous) == 0
    after = lines(tmp_path)[len(before) :]
    assert before == truth[: len(before)] and after == truth[-len(after) :]
    assert after[0][0] == MOMENTS[moment][-1]
    assert (tmp_path / "saved" / "step_00000006" / "state.json").is_file()
