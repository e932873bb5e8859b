"""Runs: order of stages, skipping, rerunning, resuming after kills, and the same table at every layout."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import yaml

from minitron_megatron.errors import CheckpointError, DataError, MinitronError, PlanError, RecipeError, TopologyError
from minitron_megatron.events import Event
from minitron_megatron.files import MANIFEST, checksum, locked, read_json, write_checksums, write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report.measured import predicted_rows
from minitron_megatron.run import STAGES, dry_run, run, wanted
from minitron_megatron.testing import Pool
from tests.limits import HANGS

Write = Callable[..., Path]
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm.imports"])


def work(topology: Topology, recipe: Path, overrides: tuple[str, ...] = (), only: str | None = None) -> None:
    """Run a recipe on a rank of the pool."""
    run(load_recipe(recipe, overrides), topology, only=only)


def alone(recipe: Path, kill_at: tuple[str, str, int] | None = None, until: str | None = None) -> None:
    """Run a recipe in one process, up to the stage `until`; `kill_at` (stage, label, n): kill -9 at that stage's n-th
    event of that label."""
    import torch

    torch.set_num_threads(1)
    keys, seen = load_recipe(recipe), 0

    def listener(event: Event) -> None:
        nonlocal seen
        if kill_at is None or event.label != kill_at[1]:
            return
        done = {path.stem for path in (keys.out / "stages").glob("*.json")}
        if next(stage.name for stage in wanted(keys) if stage.name not in done) == kill_at[0]:
            seen += 1
            if seen == kill_at[2]:
                os.kill(os.getpid(), signal.SIGKILL)

    run(keys, Topology.start(), listener=listener, until=until)


def in_a_process(recipe: Path, kill_at: tuple[str, str, int] | None = None, *, until: str | None = None) -> int | None:
    process = FORKS.Process(target=alone, args=(recipe, kill_at, until))
    process.start()
    process.join(HANGS)
    return process.exitcode


def table(recipe: Path) -> list[dict[str, Any]]:
    """Return the summary without times."""
    rows = read_json(load_recipe(recipe).out / "summary.json")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of an uninterrupted run."""
    from tests.recipes import tiny_recipe

    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(material) | {"out": str(folder / "run")}))
    assert in_a_process(recipe) == 0
    return recipe


def test_a_run_leaves_a_table_a_plan_and_an_export_that_transformers_loads(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, rows = load_recipe(finished).out, table(finished)
    assert [row["model"] for row in rows] == ["teacher", "corrected teacher", "pruned", "distilled", "random init"]
    export = AutoModelForCausalLM.from_pretrained(out / "export")
    assert sum(weight.numel() for weight in export.parameters()) == rows[3]["parameters"] < rows[0]["parameters"]
    assert AutoTokenizer.from_pretrained(out / "export")("w3 w4").input_ids == [3, 4]
    loss = {row["model"]: row["loss_nats_per_token"] for row in rows}
    assert loss["corrected teacher"] < loss["teacher"]
    assert loss["distilled"] < loss["pruned"]
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").iterdir())
    ratios = {row[0]: row[3] for row in predicted_rows(out)}
    counted = [name for name in ratios if name.startswith("parameters, ")]
    assert len(counted) == 6 and {ratios[name] for name in (*counted, "size of the export")} == {"1.000"}
    assert ratios["memory of the fullest rank (predicted: without activations)"] == "-"


def test_a_second_run_does_nothing(finished: Path) -> None:
    out = load_recipe(finished).out
    before = {path: path.stat().st_mtime_ns for path in (out / "stages").iterdir()}
    assert all(step.state == "done" for step in dry_run(load_recipe(finished)))
    assert in_a_process(finished) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "stages").iterdir()} == before


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=2", "prepare"),
        ("correct.lr=1.0e-3", "correct"),
        ("score.samples=8", "score"),
        ("prune.teacher=original", "score"),
        ("prune.ffn=32", "prune"),
        ("distill.lr=1.0e-3", "distill"),
        ("export.dtype=float32", "export"),
    ],
)
def test_an_edited_recipe_runs_what_it_changes_and_what_follows(finished: Path, override: str, first: str) -> None:
    states = {step.stage: step.state for step in dry_run(load_recipe(finished, [override]))}
    changed = {stage for stage, state in states.items() if state != "done"}
    follows = {"baseline", "evaluate", "export"}
    order = list(states)
    if first in ("prepare", "correct", "score", "prune"):
        assert changed == set(order[order.index(first) :])
    else:
        assert changed == ({first} | follows if first == "distill" else {first})


@pytest.mark.parametrize("override", ["seed=2", "data.sequence=8"])
def test_what_draws_other_samples_reruns_all_that_draws(
    finished: Path, recipe_file: Write, pool: Pool, override: str
) -> None:
    """They rerun even if the tokens are unchanged."""
    recipe = recipe_file()
    copytree(load_recipe(finished).out, load_recipe(recipe).out)
    pool.run(work, recipe, (override,), "prepare")
    states = {step.stage: step.state for step in dry_run(load_recipe(recipe, [override]))}
    assert {stage for stage, state in states.items() if state == "done"} == {"prepare"}


def test_the_layout_reruns_nothing(finished: Path) -> None:
    steps = dry_run(load_recipe(finished, ["parallel.tp=2", "parallel.pp=2"]))
    assert {step.state for step in steps} == {"done"}


KILLS = [
    ("prepare", "prepare", 1),
    ("correct", "correct", 3),
    ("score", "score", 1),
    ("prune", "export", 5),
    ("distill", "distill", 5),
    ("baseline", "baseline", 3),
    ("evaluate", "evaluate", 2),
    ("export", "export", 5),
]
KEEPS = ("prepare", "correct", "distill", "baseline", "evaluate")  # each kill leaves partial results


@pytest.mark.parametrize("kill_at", KILLS, ids=["-".join(map(str, kill)) for kill in KILLS])
def test_a_killed_run_goes_on_to_the_same_table(
    finished: Path, recipe_file: Write, kill_at: tuple[str, str, int]
) -> None:
    recipe = recipe_file()
    copy_until(finished, recipe, kill_at[0])
    assert in_a_process(recipe, kill_at) == -signal.SIGKILL
    states = {step.stage: step.state for step in dry_run(load_recipe(recipe))}
    assert states[kill_at[0]] == ("resume" if kill_at[0] in KEEPS else "run")
    order = [stage.name for stage in wanted(load_recipe(recipe))]
    last = order[-1] if kill_at[0] == "correct" else kill_at[0]  # a stage's record decides what the next ones do
    assert in_a_process(recipe, until=last) == 0
    done = order[: order.index(last) + 1]
    assert [record_of(recipe, name) for name in done] == [record_of(finished, name) for name in done]
    if "evaluate" in done:
        assert table(recipe) == table(finished)


def record_of(recipe: Path, stage: str) -> dict[str, Any]:
    """Return what a stage recorded, without times and memory."""
    record = read_json(load_recipe(recipe).out / "stages" / f"{stage}.json")
    return {key: record[key] for key in ("fingerprint", "result")}


def copy_until(finished: Path, recipe: Path, stage: str) -> None:
    """Copy the finished run's stages before `stage` into a new run, so that only the killed stages run."""
    import shutil

    source, target = load_recipe(finished).out, load_recipe(recipe).out
    shutil.copytree(source, target)
    names = list(STAGES)
    for name in names[names.index(stage) :]:
        (target / "stages" / f"{name}.json").unlink(missing_ok=True)
    keys = load_recipe(recipe).model_dump(mode="json")
    (target / "recipe.yaml").write_text(yaml.safe_dump(keys))


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_the_table_does_not_depend_on_the_layout(
    finished: Path, recipe_file: Write, pool: Pool, layout: dict[str, int]
) -> None:
    recipe = recipe_file()
    keys = tuple(f"parallel.{key}={value}" for key, value in layout.items() if key != "dp")
    pool.run(work, recipe, keys, **layout)
    for mine, theirs in zip(table(recipe), table(finished), strict=True):
        assert mine["model"] == theirs["model"]
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss_nats_per_token"] == pytest.approx(theirs["loss_nats_per_token"], abs=1e-4)


def test_the_student_learns_from_the_loss_that_the_recipe_names(finished: Path, recipe_file: Write, pool: Pool) -> None:
    """An offloaded teacher that runs window by window gives the same student."""
    distilled = []
    for number, keys in enumerate(
        [{"offload_teacher": True, "teacher_window": 1}, {"loss": {"divergence": "mse", "ce_weight": 0.5}}]
    ):
        training = load_recipe(finished).distill.model_dump(
            mode="json", exclude={"loss", "offload_teacher", "teacher_window"}
        )
        recipe = recipe_file(distill=training | keys, out=str(finished.parent / f"other-{number}"))
        copy_until(finished, recipe, "distill")
        pool.run(work, recipe, (), "distill")
        distilled.append(read_json(load_recipe(recipe).out / "stages" / "distill.json")["result"]["hash"])
    expected = read_json(load_recipe(finished).out / "stages" / "distill.json")["result"]["hash"]
    assert distilled[0] == expected != distilled[1]


def test_one_stage_needs_those_before_it(recipe_file: Write, pool: Pool) -> None:
    with pytest.raises(RecipeError, match="prune needs the stage prepare"):
        pool.run(work, recipe_file(), (), "prune", tp=2)
    pool.run(work, recipe_file(), (), "prepare", tp=2)
    with pytest.raises(RecipeError, match="prune needs the stage correct"):
        pool.run(work, recipe_file(), (), "prune", tp=2)


HOW_TO_RUN = [
    *("data.workers=2", "data.repeat=true", "score.micro_batch=2", "evaluate.micro_batch=1", "recompute=full"),
    *("hang_seconds=600", "log.project=other", "bench.requests=64", "distill.micro_batch=2", "distill.save_every=1"),
    *("distill.keep_checkpoints=1", "distill.save_async=false", "distill.validate_every=1", "distill.teacher_window=1"),
    *("distill.offload_teacher=true", "distill.loss.budget_mib=1"),
]


def first_step(topology: Topology, recipe: Path, overrides: list[str]) -> int:
    """Run a recipe; return the first distillation step that it ran."""
    steps: list[int] = []
    run(
        load_recipe(recipe, overrides),
        topology,
        listener=lambda e: steps.append(e.done) if e.label == "distill" else None,
    )
    return steps[0]


def test_a_key_that_says_how_to_run_throws_no_work_away(finished: Path, recipe_file: Write, pool: Pool) -> None:
    """A finished run reruns nothing; an interrupted one resumes from its checkpoint, to the same numbers."""
    recipe = recipe_file()
    copy_until(finished, recipe, "distill")
    assert in_a_process(recipe, ("distill", "distill", 5)) == -signal.SIGKILL
    for key in HOW_TO_RUN:
        assert {step.state for step in dry_run(load_recipe(finished, [key]))} == {"done"}, key
        states = {step.stage: step.state for step in dry_run(load_recipe(recipe, [key]))}
        assert states["prune"] == "done" and states["distill"] == "resume", key
    assert {step.stage: step.state for step in dry_run(load_recipe(recipe, ["distill.clip=0.5"]))}["distill"] == "run"
    [first] = pool.run(first_step, recipe, HOW_TO_RUN)
    assert first > 2
    for mine, theirs in zip(table(recipe), table(finished), strict=True):
        assert mine["loss_nats_per_token"] == pytest.approx(theirs["loss_nats_per_token"], abs=1e-5)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def other_rope(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 3.0}))


def exchanged(path: Path) -> None:
    """Replace a model of the run by another intact one."""
    rmtree(path)
    copytree(path.parent / "random", path)


def lost_scores(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["hidden"][3] = float("nan")
    save_file(tensors, path, about)


SPOILT: list[tuple[str, str, Callable[[Path], None]]] = [
    ("prune", "scores/scores.safetensors", flipped),
    ("prune", "scores/scores.safetensors", lost_scores),
    ("distill", "pruned/model.safetensors", flipped),
    ("distill", "pruned/config.json", other_rope),
    ("distill", "pruned/plan.json", Path.unlink),
    ("evaluate", "corrected/model.safetensors", flipped),
    ("evaluate", "distilled", exchanged),
    ("export", "distilled/model.safetensors", flipped),
]


@pytest.mark.parametrize(("stage", "name", "spoil"), SPOILT, ids=[f"{row[0]}-{row[1]}" for row in SPOILT])
def test_what_a_stage_reads_is_what_the_run_wrote(
    finished: Path, recipe_file: Write, pool: Pool, stage: str, name: str, spoil: Callable[[Path], None]
) -> None:
    recipe = recipe_file()
    copy_until(finished, recipe, stage)
    spoil(load_recipe(recipe).out / name)
    with pytest.raises(CheckpointError, match=name.partition("/")[0]) as caught:
        pool.run(work, recipe, (), stage, dp=2)
    assert "Remove" in str(caught.value) and "again" in str(caught.value)


@pytest.mark.parametrize("name", ["stages/prepare.json", "stages/score.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '{"fingerprint": 1}', "NaN", None])
def test_a_torn_or_foreign_record_is_one_error_that_names_it(
    finished: Path, recipe_file: Write, name: str, content: str | None
) -> None:
    recipe = recipe_file()
    copy_until(finished, recipe, "prune")
    path = load_recipe(recipe).out / name
    if content is None:  # right fingerprint, but no result
        content = json.dumps(json.loads(path.read_text()) | {"result": {"sources": []}})
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"{path}.*\. Remove it to run the stage {path.stem} again\.$"):
        dry_run(load_recipe(recipe))


def test_a_student_that_is_not_finite_is_not_written(finished: Path, recipe_file: Write, pool: Pool) -> None:
    """A model with weights that are not finite is not evaluated either."""
    from safetensors.torch import load_file, save_file

    recipe = recipe_file()
    copy_until(finished, recipe, "export")
    weights = load_recipe(recipe).out / "distilled" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    record = load_recipe(recipe).out / "stages" / "distill.json"
    manifest = weights.parent / MANIFEST
    write_checksums(manifest, (path for path in weights.parent.iterdir() if path != manifest))
    saved = read_json(record)
    saved["result"]["files"] = checksum(manifest)
    write_json(record, saved)
    rmtree(load_recipe(recipe).out / "export")
    with pytest.raises(CheckpointError, match="distilled has weights that are not finite, in "):
        pool.run(work, recipe, (), dp=2)
    assert not (load_recipe(recipe).out / "export").exists()


def with_tokenizer(model: Path, folder: Path, ids: dict[str, int]) -> Path:
    """Copy a model, with another tokenizer."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copytree(model, folder)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


WRONG: list[tuple[str, dict[str, Any], dict[str, int], type[MinitronError], str]] = [
    ("kept size larger than the teacher's", {"prune": {"hidden": 64}}, {}, PlanError, "hidden should keep 64 of 48"),
    ("heads that do not divide", {"prune": {"heads": 3}}, {}, PlanError, "2 kv_groups"),
    ("a layer that is not there", {"prune": {"layers": [0, 9]}}, {}, PlanError, "layers"),
    ("a size that does not divide over tp", {"prune": {"ffn": 33}}, {"tp": 2}, TopologyError, "TP=2"),
    ("more stages than layers", {"prune": {"layers": [0]}}, {"pp": 2}, TopologyError, "1 layer cannot fill 2"),
    (
        "an interleaving with a remainder",
        {"score": {"samples": 3}},
        {"pp": 2, "vp": 2},
        RecipeError,
        "a multiple of pp=2",
    ),
    (
        "a sequence that cannot be shared",
        {"distill": {"phases": [{"sequence": 18, "tokens": 288}]}},
        {"dp": 2, "cp": 2},
        RecipeError,
        "distill.phases.0.sequence is 18, which cannot be split over cp=2. Choose a multiple of 4.",
    ),
    ("a batch that does not divide", {"score": {"samples": 3, "micro_batch": 2}}, {}, RecipeError, "samples is 3"),
    ("a top_k above the vocabulary", {"distill": {"loss": {"top_k": 132}}}, {}, RecipeError, "top_k is 132, but there"),
    ("layers that are not there", {"spec": "te"}, {}, RecipeError, "needs Transformer Engine"),
    ("a missing model", {"model": "nowhere"}, {}, CheckpointError, "no such folder"),
    ("a missing corpus", {"data": {"sources": [{"path": "nowhere.jsonl"}]}}, {}, DataError, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("case", "changes", "layout", "kind", "said"), WRONG, ids=[case[0] for case in WRONG])
@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_error_on_every_rank_and_nothing_is_written(
    recipe_file: Write,
    pool: Pool,
    ranks: int,
    case: str,
    changes: dict[str, Any],
    layout: dict[str, int],
    kind: type[MinitronError],
    said: str,
) -> None:
    if ranks == 1 and layout:
        pytest.skip("this error needs two ranks")
    recipe = recipe_file(**changes)
    keys = tuple(f"parallel.{key}={value}" for key, value in layout.items() if key != "dp")
    with pytest.raises(kind) as caught:
        pool.run(work, recipe, keys, **(layout or {"dp": ranks}))
    assert said in str(caught.value)
    assert not (recipe.parent / "run").exists()


def test_an_empty_corpus_and_a_foreign_tokenizer_are_refused(
    recipe_file: Write, pool: Pool, material: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="empty"):
        pool.run(work, recipe_file(data={"sources": [{"path": str(empty)}]}), dp=2)
    model = with_tokenizer(
        material / "model", tmp_path / "other", {"<end>": 0, **{f"w{i}": i + 300 for i in range(1, 131)}}
    )
    with pytest.raises(DataError, match=r"the token 'w\d+'"):
        pool.run(work, recipe_file(model=str(model)), dp=2)


def test_truncated_weights_are_refused(recipe_file: Write, pool: Pool, material: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(material / "model", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="torn"):
        pool.run(work, recipe_file(model=str(tmp_path / "torn")), dp=2)


def test_a_run_folder_of_another_model_or_of_nobody_is_refused(
    finished: Path, recipe_file: Write, pool: Pool, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(load_recipe(finished).model, tmp_path / "other")
    other = recipe_file(model=str(tmp_path / "other"), out=str(load_recipe(finished).out))
    with pytest.raises(RecipeError, match=r"belongs to a recipe for the model .*\. Give another folder with --out\."):
        pool.run(work, other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RecipeError, match=r"full is not empty and was not made by a run\. Give another folder"):
        pool.run(work, recipe_file(out=str(tmp_path / "full")))


def test_a_second_run_in_the_same_folder_is_refused(finished: Path, pool: Pool) -> None:
    """The refusal does not depend on the stage; the lock file does not block runs after its process has ended."""
    out = load_recipe(finished).out
    with locked(out / ".lock") as alone:
        assert alone
        with pytest.raises(
            RecipeError, match=rf"^another run is running in {out}\. Wait until it ends, or give another"
        ):
            pool.run(work, finished, tp=2)
    pool.run(work, finished)


def test_a_teacher_that_changed_under_the_run_is_refused(finished: Path, recipe_file: Write, pool: Pool) -> None:
    recipe = recipe_file()
    copy_until(finished, recipe, "score")
    record = load_recipe(recipe).out / "stages" / "correct.json"
    saved = json.loads(record.read_text())
    saved["result"]["hash"] = "0" * 64
    write_json(record, saved)
    with pytest.raises(CheckpointError, match="changed since the run began"):
        pool.run(work, recipe, tp=2)
