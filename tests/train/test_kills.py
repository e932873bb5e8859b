"""A run killed at any moment of writing a checkpoint resumes to the same numbers as an uninterrupted one."""

from __future__ import annotations

import json
import os
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
FORKS.set_forkserver_preload(["tests.warm.imports"])

TRAINING = Training(steps=20, lr=2e-3, min_lr=2e-4, warmup_steps=5, save_every=7, keep_checkpoints=1, save_async=False)
MOMENTS = range(2, 40, 8)


def work(folder: Path, checkpoints: Path, log: Path, asynchronous: bool, kill_at: int) -> None:
    """Train, with a line in `log` for each step and one for the weights.

    Kill -9 when this process or its writers create, open or rename something among the checkpoints for the n-th time.
    """
    import torch

    torch.set_num_threads(1)
    topology, main, seen = Topology.start(), os.getpid(), 0
    model = load_hf(folder, topology)

    def watch(event: str, arguments: Any) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir") and str(arguments[0]).startswith(str(checkpoints)):
            seen += 1
            if seen == kill_at:
                os.kill(main, signal.SIGKILL)

    def note(*line: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    sys.addaudithook(watch)
    train(
        model,
        LMObjective(topology),
        lambda step: share(samples(8, seed=step), topology, 4),
        TRAINING.replaced(save_async=asynchronous),
        topology,
        saving=Saving(checkpoints),
        listener=lambda event: note(event.done, event.values["loss"], event.values["grad_norm"]),
    )
    note("weights", model_hash(model, topology))


def run(folder: Path, at: Path, asynchronous: bool, kill_at: int = 0) -> int | None:
    process = FORKS.Process(target=work, args=(folder, at / "saved", at / "log", asynchronous, kill_at))
    process.start()
    process.join(HANGS)
    return process.exitcode


def lines(at: Path) -> list[Any]:
    return [json.loads(line) for line in (at / "log").read_text().splitlines()]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    checkpoints: dict[str, Path], tmp_path: Path, asynchronous: bool
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(checkpoints["untied"], whole, asynchronous) == 0
    truth, resumed_from = lines(whole), set()
    for moment in MOMENTS:
        at = tmp_path / str(moment)
        at.mkdir()
        if run(checkpoints["untied"], at, asynchronous, moment) == 0:
            break
        before = lines(at)
        assert run(checkpoints["untied"], at, asynchronous) == 0
        after = lines(at)[len(before) :]
        assert before == truth[: len(before)] and after == truth[-len(after) :]
        resumed_from.add(after[0][0])
        assert after[0][0] >= len(before) - 7 - (7 if asynchronous else 0), "more than an interval was lost"
        assert (at / "saved" / "step_00000014" / "state.json").is_file()
    assert len(resumed_from) > 1
