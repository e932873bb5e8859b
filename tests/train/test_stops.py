"""Training that stops early leaves a state to resume from; a non-finite step changes nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf, model_hash
from minitron_megatron.errors import Preempted, TrainingError
from minitron_megatron.events import Event
from minitron_megatron.model import named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import MOST_SKIPPED, LMObjective, Saving, Training, train
from tests.tiny import LAYOUTS, samples, share

TRAINING = Training(steps=8, lr=1e-3, warmup_steps=2, save_async=False)
Said = list[tuple[int, float, str]]
"""(step, skipped steps, hash of the weights after the step)."""


@dataclass(frozen=True)
class Job:
    """One training. broken: steps, from 1, whose gradient is not finite. signalled: (rank, step after which it gets the
    signal). poisoned: step after which a weight of the last rank is NaN. validation: the validation loss."""

    folder: Path
    broken: frozenset[int] = frozenset()
    signalled: tuple[int, int] | None = None
    checkpoints: Path | None = None
    training: Training = TRAINING
    number: int = signal.SIGTERM
    poisoned: int = 0
    validation: float | None = None


class Fragile(LMObjective):
    """Cross-entropy whose gradient is not finite on one rank, at some steps."""

    def __init__(self, topology: Topology, broken: frozenset[int], start: int) -> None:
        super().__init__(topology)
        self.broken, self.step = broken, start

    def prepare(self, batches: Any) -> None:
        self.step += 1

    def loss(self, *args: Any) -> Tensor:
        loss = super().loss(*args)
        if self.step in self.broken:
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss


def run(topology: Topology, job: Job, start: int = 0) -> tuple[Said, str]:
    """Train until the end or an error; return the steps seen and the error."""
    model, steps_seen = load_hf(job.folder, topology), []

    def listen(event: Event) -> None:
        steps_seen.append((event.done, event.values["skipped"], model_hash(model, topology)))
        if job.signalled == (topology.rank, event.done):
            os.kill(os.getpid(), job.number)
        if job.poisoned == event.done and topology.rank == topology.world - 1:
            list(named_shards(model))[-1].tensor.data.view(-1)[-1] = torch.nan

    def batches(step: int) -> list[Any]:
        return share(samples(8, seed=step), topology, 4)

    try:
        train(
            model,
            Fragile(topology, job.broken, start),
            batches,
            job.training,
            topology,
            label="distill",
            saving=Saving(job.checkpoints),
            validate=None if job.validation is None else lambda: {"validation_loss": job.validation},
            listener=listen,
        )
    except (Preempted, TrainingError) as error:
        return steps_seen, f"{type(error).__name__}: {error}"
    return steps_seen, ""


@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2", "dp2"])
def test_a_broken_step_changes_nothing_and_is_counted(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    (steps_seen, error), *_ = pool.run(run, Job(checkpoints["untied"], frozenset({3, 6, 7})), **LAYOUTS[layout])
    assert error == ""
    assert [skipped for _, skipped, _ in steps_seen] == [0, 0, 1, 1, 1, 2, 3, 3]
    hashes = [digest for *_, digest in steps_seen]
    assert hashes[2] == hashes[1] != hashes[3]
    assert hashes[4] == hashes[5] == hashes[6] != hashes[7]


def test_many_in_a_row_stop_with_a_saved_state(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    training = TRAINING.replaced(steps=MOST_SKIPPED + 5)
    job = Job(checkpoints["untied"], frozenset(range(3, 100)), checkpoints=tmp_path, training=training)
    for steps_seen, error in pool.run(run, job, tp=2):
        assert error == (
            f"TrainingError: the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row, up to step "
            f"{MOST_SKIPPED + 2}. Check the data of these steps, or lower the learning rate (`lr`)."
        )
        assert steps_seen[-1][1] == MOST_SKIPPED
    assert (tmp_path / f"step_{MOST_SKIPPED + 2:08}").is_dir()


@pytest.mark.parametrize(("layout", "number"), [("tp2", signal.SIGTERM), ("pp2", signal.SIGUSR1)])
def test_a_signal_at_any_rank_saves_and_the_next_run_goes_on(
    pool: Pool, checkpoints: dict[str, Path], layout: str, number: int, tmp_path: Path
) -> None:
    whole, _ = pool.run(run, Job(checkpoints["untied"]), **LAYOUTS[layout])[0]
    job = Job(checkpoints["untied"], signalled=(1, 3), checkpoints=tmp_path, number=number)
    for steps_seen, error in pool.run(run, job, **LAYOUTS[layout]):
        assert error.startswith("Preempted") and [step for step, *_ in steps_seen] == [1, 2, 3]
    rest, error = pool.run(run, replace(job, signalled=None), **LAYOUTS[layout])[0]
    assert error == "" and rest == whole[3:]
    assert signal.getsignal(number) is signal.SIG_DFL


ENDS = [
    ({"broken": range(1, 5)}, "distill ended at step 4 without a result"),
    ({"broken": range(1, 5), "validation": 2.0}, "distill ended at step 4 without a result"),
    ({"broken": [4]}, ""),  # the model is that of step 3, whose loss was finite; this one's is too
    ({"validation": torch.nan}, "distill ended at step 4 without a result"),
    ({"validation": torch.inf}, "distill ended at step 4 without a result"),
    ({"broken": [4], "validation": 2.0}, ""),
    ({"poisoned": 2}, "the model that `distill` trains, after step 4, has weights that are not finite"),
    (
        {"poisoned": 4, "validation": 2.0},
        "the model that `distill` trains, after step 4, has weights that are not finite",
    ),
]


@pytest.mark.parametrize(("how", "message"), ENDS)
def test_an_end_without_a_result_is_an_error(pool: Pool, checkpoints: dict[str, Path], how: Any, message: str) -> None:
    """The training has fewer steps than the number of skipped steps that stops it."""
    job = Job(
        checkpoints["untied"],
        training=TRAINING.replaced(steps=4),
        **{**how, "broken": frozenset(how.get("broken", ()))},
    )
    for _, error in pool.run(run, job, tp=2):
        assert error.startswith(f"TrainingError: {message}" if message else "") and bool(error) == bool(message)


def test_before_the_first_update_there_is_nothing_to_save(
    pool: Pool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    training = TRAINING.replaced(save_every=1)
    job = Job(checkpoints["untied"], frozenset({1, 2}), (0, 1), checkpoints=tmp_path, training=training)
    [(_, error)] = pool.run(run, job)
    assert error.startswith("Preempted") and not list(tmp_path.iterdir())
    [(steps_seen, error)] = pool.run(run, replace(job, signalled=None))
    assert error == "" and steps_seen[-1][:2] == (8, 2)
    assert [path.name for path in tmp_path.iterdir()]


def test_weights_that_are_not_finite_are_never_saved(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    training = TRAINING.replaced(save_every=2, keep_checkpoints=1)
    job = Job(checkpoints["untied"], checkpoints=tmp_path, training=training, poisoned=5)
    for steps_seen, error in pool.run(run, job, pp=2):
        assert error.startswith("TrainingError") and "after step 6, has weights that are not finite" in error
        assert [step for step, *_ in steps_seen] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
