"""Training equals plain torch's AdamW on the same model, at every layout; a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_megatron.convert import load_hf, model_hash, save_hf
from minitron_megatron.errors import CheckpointError
from minitron_megatron.events import Event
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Saving, Training, mean_loss, train
from minitron_megatron.train.loop import _Run
from tests.tiny import CONTEXT, LAYOUTS, Stop, cross_entropy, naive_training, note, samples, share, transformer

TRAINING = Training(steps=20, lr=2e-3, min_lr=2e-4, warmup_steps=5, clip=1.0, save_async=False)
BATCH = 8

Curve = list[dict[str, float]]
Result = tuple[Curve, str]
"""(values of each step, hash of the final weights)."""


@dataclass(frozen=True)
class Job:
    """A training of the Hugging Face model in `folder`."""

    folder: Path
    training: Training = TRAINING
    micro_batch: int = 4
    dtype: torch.dtype = torch.float32
    checkpoints: Path | None = None
    identity: str = "run"
    stop_at: int | None = None
    out: Path | None = None
    begin: tuple[Path, str] | None = None
    save_last: bool = False
    first: int = 0
    """Seed of the first step's batch."""


def run(topology: Topology, job: Job) -> Result:
    model, curve = load_hf(job.folder, topology, job.dtype), []
    keep = note(curve, job.stop_at)

    def listen(event: Event) -> None:
        assert (event.label, event.total, event.unit) == ("correct", job.training.steps, "steps")
        keep(event)

    with suppress(Stop):
        train(
            model,
            LMObjective(topology),
            lambda step: share(samples(BATCH, seed=job.first + step), topology, job.micro_batch),
            job.training,
            topology,
            label="correct",
            saving=Saving(job.checkpoints, job.identity, job.begin, job.save_last),
            listener=listen,
        )
    if job.out:
        save_hf(model, job.out, topology, files_from=job.folder)
    return curve, model_hash(model, topology)


def column(curve: Curve, key: str) -> list[float]:
    return [values[key] for values in curve]


# ---- against plain torch


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Path]) -> dict[str, tuple[Curve, Any]]:
    """Return name -> (the curve of plain torch, its trained transformers model)."""
    found = {}
    for name in ("untied", "tied"):
        model = transformer(checkpoints[name])
        found[name] = naive_training(model, lambda step: samples(BATCH, seed=step), TRAINING, cross_entropy), model
    return found


MODELS = [
    *(("untied", layout) for layout in ("tp1", "tp2-sp", "pp2-vp2", "dp2", "cp2-dp2")),
    *(("tied", layout) for layout in ("tp2-pp2", "cp2-pp2-vp2")),
]


@pytest.mark.parametrize(("name", "layout"), MODELS)
def test_twenty_steps_are_those_of_plain_torch(
    pool: Pool, checkpoints: dict[str, Path], truth: dict, name: str, layout: str, tmp_path: Path
) -> None:
    """Law 1 for training: loss, learning rate, gradient norm and final weights are equal on every rank."""
    results = pool.run(run, Job(checkpoints[name], out=tmp_path), **(LAYOUTS | CONTEXT)[layout])
    curve, model = truth[name]
    for found, _ in results:
        expect_same(found, curve)
    for found, expected in zip(transformer(tmp_path).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Adam's steps are 2e-3 each


def expect_same(found: Curve, expected: Curve) -> None:
    """The loss is equal to 1e-5."""
    assert len(found) == len(expected)
    for key in ("loss", "grad_norm", "lr"):
        assert column(found, key) == pytest.approx(column(expected, key), rel=1e-5), key


@pytest.mark.parametrize("layout", ["tp1", "dp2"])
def test_micro_batches_change_nothing(pool: Pool, checkpoints: dict[str, Path], truth: dict, layout: str) -> None:
    """The loss is a mean over the tokens of the global batch, however unevenly they fall to ranks and micro-batches."""
    for micro_batch in (1, 2):
        job = Job(checkpoints["untied"], micro_batch=micro_batch, stop_at=3)
        for found, _ in pool.run(run, job, **LAYOUTS[layout]):
            expect_same(found, truth["untied"][0][:3])


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (4, 2, [0.5e-3, 1e-3, 0.55e-3, 1e-4]),
        (4, 0, [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]),
        (3, 3, [1e-3 / 3, 2e-3 / 3, 1e-3]),
        (3, 40, [1e-3 / 40, 2e-3 / 40, 3e-3 / 40]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_a_cosine(
    pool: Pool, checkpoints: dict[str, Path], steps: int, warmup: int, expected: list[float]
) -> None:
    """The first step's learning rate is peak / warm-up, the last one's the minimum."""
    training = Training(steps=steps, lr=1e-3, min_lr=1e-4, warmup_steps=warmup)
    ((curve, _),) = pool.run(run, Job(checkpoints["untied"], training, micro_batch=BATCH))
    assert column(curve, "lr") == pytest.approx(expected, rel=1e-9)


def twice(topology: Topology, job: Job) -> Curve:
    model, curve = load_hf(job.folder, topology), []
    for first in (0, 100):
        train(
            model,
            LMObjective(topology),
            lambda step, first=first: share(samples(BATCH, seed=first + step), topology, job.micro_batch),
            job.training,
            topology,
            listener=lambda event: curve.append(dict(event.values)),
        )
    return curve


def test_a_trained_model_trains_again(pool: Pool, checkpoints: dict[str, Path]) -> None:
    """The first run leaves nothing on the model except its weights."""
    training = TRAINING.replaced(steps=4, warmup_steps=2)
    model = transformer(checkpoints["untied"])
    truth = [
        values
        for first in (0, 100)
        for values in naive_training(
            model, lambda step, first=first: samples(BATCH, seed=first + step), training, cross_entropy
        )
    ]
    for found in pool.run(twice, Job(checkpoints["untied"], training), dp=2):
        expect_same(found, truth)


# ---- stopped and resumed

TEN = TRAINING.replaced(steps=10, save_every=3)


def broken(topology: Topology, job: Job, checkpoints: Path) -> tuple[Result, Result, Result, list[str]]:
    """Return (uninterrupted curve, curve until the stop after step 7, resumed curve, checkpoints left)."""
    unbroken = run(topology, job)
    stopped = run(topology, replace(job, checkpoints=checkpoints, stop_at=7))
    left = sorted(path.name for path in checkpoints.iterdir())
    return unbroken, stopped, run(topology, replace(job, checkpoints=checkpoints)), left


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, torch.float32) for layout in ("tp2-sp", "pp2-vp2")),
        *((layout, torch.bfloat16) for layout in ("tp1", "dp2")),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    pool: Pool, checkpoints: dict[str, Path], layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """With bf16, the fp32 master weights are restored too."""
    job = Job(checkpoints["untied"], TEN, dtype=dtype)
    for unbroken, stopped, resumed, left in pool.run(broken, job, tmp_path / "run", **LAYOUTS[layout]):
        assert left == ["step_00000003", "step_00000006"]
        assert timeless(stopped[0]) == timeless(unbroken[0])[:7]
        assert timeless(resumed[0]) == timeless(unbroken[0])[6:]
        assert resumed[1] == unbroken[1] != stopped[1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_00000006", "step_00000009"]


def timeless(curve: Curve) -> Curve:
    """Return the values that must be reproduced bit for bit."""
    return [{key: values[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")} for values in curve]


@pytest.mark.parametrize(("saved_at", "layouts"), [("tp2", ["pp2", "dp2"]), ("pp2-vp2", ["tp1", "tp2"])])
def test_a_run_resumes_at_another_layout(
    pool: Pool, checkpoints: dict[str, Path], truth: dict, saved_at: str, layouts: list[str], tmp_path: Path
) -> None:
    job = Job(checkpoints["tied"], TRAINING.replaced(save_every=3), checkpoints=tmp_path / "saved", stop_at=4)
    pool.run(run, job, **LAYOUTS[saved_at])
    for layout in layouts:
        shutil.copytree(tmp_path / "saved", tmp_path / layout)
        (found, _), *_ = pool.run(run, replace(job, checkpoints=tmp_path / layout, stop_at=9), **LAYOUTS[layout])
        assert column(found, "step") == list(range(4, 10))
        expect_same(found, truth["tied"][0][3:9])


@pytest.mark.parametrize(
    ("name", "identity", "message"),
    [
        ("untied", "another", "belongs to another run"),
        ("student", "another", "belongs to another run"),
        ("student", "run", "cannot be read: Global shape mismatch"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    pool: Pool, checkpoints: dict[str, Path], name: str, identity: str, message: str, tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], TRAINING.replaced(save_every=1), checkpoints=tmp_path / "run", stop_at=2)
    pool.run(run, job)
    with pytest.raises(CheckpointError, match=rf"step_00000001 {message}.* There is no older checkpoint: remove .*run"):
        pool.run(run, replace(job, folder=checkpoints[name], identity=identity))


def run_and_hear(topology: Topology, job: Job) -> tuple[Result, list[str]]:
    """Return the result and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = run(topology, job)
    return result, [str(each.message) for each in caught if "checkpoint" in str(each.message)]


def spoil(checkpoint: Path, how: str) -> None:
    if how == "torn":
        file = next(checkpoint.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:100])
    elif how == "hostile":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(print))
    else:
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps(state | {"identity": "another"}))


@pytest.fixture(scope="module")
def stopped(pool: Pool, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Result]:
    """Return a TP2 run that stopped after its second checkpoint, and the uninterrupted result."""
    job = Job(checkpoints["untied"], TEN, checkpoints=tmp_path_factory.mktemp("stopped") / "run")
    pool.run(run, replace(job, stop_at=8), tp=2)
    return job, pool.run(run, replace(job, checkpoints=None), tp=2)[0]


@pytest.mark.parametrize("how", ["torn", "hostile", "foreign"])
def test_the_checkpoint_before_a_spoilt_one_is_used(
    pool: Pool, stopped: tuple[Job, Result], how: str, tmp_path: Path
) -> None:
    before, unbroken = stopped
    assert before.checkpoints is not None
    shutil.copytree(before.checkpoints, tmp_path / "run")
    job = replace(before, checkpoints=tmp_path / "run")
    spoil(tmp_path / "run" / "step_00000006", how)
    first, other = pool.run(run_and_hear, job, tp=2)
    for curve, weights in (first[0], other[0]):
        assert timeless(curve) == timeless(unbroken[0])[3:] and weights == unbroken[1]
    assert [text.endswith("Resuming from step_00000003 instead.") for text in first[1]] == [True] and not other[1]


# ---- one phase after another


def in_phases(topology: Topology, jobs: Sequence[Job]) -> list[Result]:
    """Train each phase on a new model, filled from the previous phase's checkpoint."""
    ends = [None, *((job.checkpoints, job.identity) for job in jobs)]
    return [run(topology, replace(job, begin=end, save_last=True)) for job, end in zip(jobs, ends, strict=False)]


def test_a_phase_goes_on_where_the_one_before_ended(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A phase starts with the previous weights, moments and token count; finished phases are not repeated."""
    flat = Training(steps=10, lr=1e-3, min_lr=1e-3, warmup_steps=0, save_every=4, save_async=False)
    curve, weights = pool.run(run, Job(checkpoints["untied"], flat), tp=2)[0]
    jobs = [
        Job(checkpoints["untied"], flat.replaced(steps=5), checkpoints=tmp_path / name, identity=name, first=first)
        for name, first in (("a", 0), ("b", 5))
    ]
    for first, second in pool.run(in_phases, jobs, tp=2):
        assert timeless(first[0]) == timeless(curve)[:5]
        assert timeless(second[0]) == [values | {"step": values["step"] - 5} for values in timeless(curve)[5:]]
        assert second[1] == weights
    for first, second in pool.run(in_phases, jobs, tp=2):
        assert (first[0], second) == ([], ([], weights))


# ---- validation


def validated(topology: Topology, job: Job) -> tuple[Curve, str, list[int], dict[str, float]]:
    """Train with a validation every four steps; return (curve, hash, validation steps, values returned by train)."""
    model, curve, called = load_hf(job.folder, topology), [], []
    held_out = share(samples(BATCH, seed=99), topology)

    def validate() -> dict[str, float]:
        called.append(len(curve) + 1)
        return {"valid_loss": mean_loss(model, held_out, LMObjective(topology), topology)[0]}

    last = train(
        model,
        LMObjective(topology),
        lambda step: share(samples(BATCH, seed=step), topology, job.micro_batch),
        job.training,
        topology,
        validate=validate,
        listener=lambda event: curve.append({"step": event.done, **event.values}),
    )
    return curve, model_hash(model, topology), called, last


@pytest.mark.parametrize("layout", ["dp2", "pp2-vp2"])
def test_validation_is_called_on_time_and_changes_nothing(
    pool: Pool, checkpoints: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], TRAINING.replaced(steps=10, validate_every=4), out=tmp_path)
    plain = pool.run(run, job, **LAYOUTS[layout])[0]
    for curve, weights, called, last in pool.run(validated, job, **LAYOUTS[layout]):
        assert called == [4, 8, 10]
        assert [values["step"] for values in curve if "valid_loss" in values] == [4, 8, 10]
        assert timeless(curve) == timeless(plain[0])
        assert weights == plain[1]
        assert {"step": 10, **last} == curve[-1]
    with torch.no_grad():
        truth = cross_entropy(transformer(tmp_path), samples(BATCH, seed=99)).item()
    assert last["valid_loss"] == pytest.approx(truth, rel=1e-5)


def test_tokens_are_those_that_count(pool: Pool, checkpoints: dict[str, Path]) -> None:
    seen = [int(samples(BATCH, seed=step).mask.sum()) for step in range(3)]
    for curve, _ in pool.run(run, Job(checkpoints["untied"], stop_at=3), dp=2):
        assert column(curve, "tokens") == [sum(seen[: done + 1]) for done in range(3)]


def test_a_checkpoint_of_another_training_or_none_says_what_to_remove(tmp_path: Path) -> None:
    def refuses(_: object) -> None:
        raise KeyError("max_lr")

    other: Any = SimpleNamespace(
        learners=[SimpleNamespace(scheduler=SimpleNamespace(load_state_dict=refuses))],
        store=SimpleNamespace(folder=tmp_path),
    )
    with pytest.raises(CheckpointError) as caught:
        _Run._resume_schedules(other, [{}])
    assert str(caught.value) == (
        f"the newest checkpoint in {tmp_path} has a learning rate schedule of another training. Remove it to resume "
        "from the one before."
    )
    saving = SimpleNamespace(folder=None, begin=(tmp_path, "phase"))
    none: Any = SimpleNamespace(
        training=None, saving=saving, store=None, topology=Topology(), _newest=lambda store, identity: None
    )
    with pytest.raises(CheckpointError) as caught:
        _Run.resume(none)
    assert str(caught.value) == (
        f"{tmp_path} holds no checkpoint to start from. Remove that folder to train its phase again."
    )
