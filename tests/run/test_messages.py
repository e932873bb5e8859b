"""Messages of a run that cannot go on: what is wrong, where, and what to do. No run takes place."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_megatron.errors import CheckpointError, DataError, FileError, MinitronError, RecipeError, TrainingError
from minitron_megatron.events import Event, silent
from minitron_megatron.files import MANIFEST, write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import engine, handover, search_task
from minitron_megatron.run.bench import _measured, _models
from minitron_megatron.run.candidate_files import Distilled, read_part
from minitron_megatron.run.context import Context
from minitron_megatron.run.engine import _claimed
from minitron_megatron.run.preemption import PreemptionListener
from minitron_megatron.run.stages import evaluate
from minitron_megatron.run.stages.search import _CandidateSearch

Write = Callable[..., Path]


def stub(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def says(kind: type[MinitronError], call: Callable[[], object]) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_run_folder_that_is_taken(recipe_file: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    recipe = load_recipe(recipe_file(out=str(out)))

    def claim() -> None:
        with _claimed(recipe, Topology()):
            pass

    (out / "thesis.tex").touch()
    assert says(RecipeError, claim) == f"{out} is not empty and was not made by a run. Give another folder with --out."
    (out / "recipe.yaml").write_text("model: other")
    assert says(RecipeError, claim) == (
        f"{out} belongs to a recipe for the model other. Give another folder with --out."
    )
    (out / "recipe.yaml").write_text("[" * 1000)
    assert says(RecipeError, claim) == (
        f"{out}/recipe.yaml: it is nested too deeply. Write it flatter. Give another folder with --out."
    )


def test_a_task_of_a_search_that_is_running(
    recipe_file: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search = {"ffn": [48], "budget": {"params": 10**6}}
    recipe = load_recipe(recipe_file(prune=None, search=search, out=str(tmp_path / "run")))
    monkeypatch.setattr(engine, "check", lambda recipe, *_: recipe)
    monkeypatch.setattr(engine, "results", lambda *_: {})
    monkeypatch.setattr(engine, "raise_when_preempted", lambda _: nullcontext(PreemptionListener(silent, [])))
    monkeypatch.setattr(engine, "locked", lambda *_, **__: nullcontext(False))
    assert says(RecipeError, lambda: search_task(recipe, stub(rank=0), 0, 2)) == (
        f"another run, or the same task, is running in {tmp_path / 'run'}. Wait until it ends."
    )
    assert says(RecipeError, lambda: search_task(recipe, Topology(), 2, 2)) == (
        "--task 2/2 is out of range: use 0/2 to 1/2."
    )


def test_a_model_folder_that_is_not_the_stages(tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    context = stub(recipe=stub(out=tmp_path), done={"distill": {"files": "0" * 64}})
    assert says(CheckpointError, lambda: Context.expect_unchanged(context, folder)) == (
        f"{folder / MANIFEST} was changed since the stage distill wrote it. Remove {folder}, and run `minitron "
        "distill` again."
    )


def test_a_job_that_would_end_the_same_way() -> None:
    listener = PreemptionListener(silent, [signal.SIGUSR1])
    listener.begins("score", keeps=False)
    assert says(RecipeError, lambda: listener(Event("score", 1, 2, "samples"))) == (
        "the job reached its time limit before the stage score was done, and no other stage was done since the start, "
        "so that a restart would end the same way. Give the job more time, or more GPUs."
    )


def test_a_run_without_checkpoints_to_hand_over(tmp_path: Path) -> None:
    context = stub(recipe=stub(out=tmp_path), phase_checkpoints=[])
    assert says(CheckpointError, lambda: handover._find(context, "newest")) == (
        f"{tmp_path} has no checkpoints of distillation: without `distill.retain` they are removed when it is done. "
        "Omit --checkpoint to export the finished student."
    )


def test_a_folder_that_exists_is_not_written_over(recipe_file: Write, tmp_path: Path) -> None:
    assert says(RecipeError, lambda: handover.hand_over(load_recipe(recipe_file()), Topology(), tmp_path)) == (
        f"{tmp_path} already exists. Give another folder with --to."
    )


def test_a_model_whose_loss_is_not_finite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "measured_row", lambda *_: {"loss_nats_per_token": float("nan")})
    folders = stub(evaluation_parts=tmp_path / "parts")
    context = stub(folders=folders, mark_of=lambda recipe: "0" * 64, recipe=None, topology=stub(rank=0))
    assert says(TrainingError, lambda: evaluate._row(context, "distilled", tmp_path, stub())) == (
        f"{tmp_path} has a loss of nan on the held-out text. Check its training."
    )


def test_a_curve_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"curve": {"last": 1.0}}))
    assert says(FileError, lambda: read_part(path, Distilled)) == (
        f"{path} has a curve whose steps are not numbers. Remove it to measure the candidate again."
    )


@pytest.mark.parametrize(
    ("keys", "points", "said"),
    [
        (
            {"winner": "ffn4"},
            {},
            "search.winner 'ffn4' is not a candidate. Did you mean 'ffn48'? run/table.md lists them.",
        ),
        ({}, {}, "no candidate has a finite loss. Check the teacher's weights, or score in float32."),
        (
            {"choose": "winogrande"},
            {"ffn48": (1.0, 2.0)},
            "no candidate has a finite score at winogrande. Set search.choose to loss.",
        ),
    ],
)
def test_a_search_without_a_winner(keys: dict[str, str], points: dict[str, Any], said: str) -> None:
    context = stub(folders=stub(search_table=Path("run/table.md")))
    search = stub(keys=stub(**{"winner": None, "choose": "loss"} | keys), candidates={"ffn48": None}, context=context)
    running = {"ffn48": {"score": float("nan")}}
    assert says(RecipeError, lambda: _CandidateSearch._winner(search, running, points)) == said


def test_an_export_that_has_changed_is_not_measured(recipe_file: Write, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_json(folder / MANIFEST, {"config.json": "0" * 64})
    assert says(FileError, lambda: _models(load_recipe(recipe_file()), "torch")) == (
        f"{folder}/config.json has changed since it was written: {MANIFEST} has another checksum. Remove {folder}, and "
        "run `minitron export` again."
    )


def test_a_benchmark_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = stub(returncode=3, stdout="", stderr="Traceback\nCudaError: out of memory\nbye\n")
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    call = ["trtllm-bench", "--model", "a b"]
    said = says(DataError, lambda: _measured(stub(tool=call[0]), stub(), call, tmp_path / "report.json"))
    assert said == (
        "trtllm-bench failed with exit code 3: CudaError: out of memory. To see all that it says, run: trtllm-bench "
        "--model 'a b'"
    )
