"""Studies: their arms are recipes that pass every check; runs share stages, resume, and are dealt out to an array."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from minitron_megatron.cli.study import run_study
from minitron_megatron.errors import RecipeError
from minitron_megatron.events import Event, silent
from minitron_megatron.files import read_json
from minitron_megatron.forecast import planned
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import STAGES, SharedStages, Stage, run
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.studies import check_job, describe_studies, load_study, plan_rows, plan_study, shipped, sign_test
from minitron_megatron.studies.jobs import _matched
from minitron_megatron.studies.quantities import filled
from minitron_megatron.studies.table import _value
from minitron_megatron.testing import Pool
from tests.formats import CHAT_TEMPLATE
from tests.guide import ROOT
from tests.limits import HANGS
from tests.recipes import tiny_recipe

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm.imports"])
SHARED = {"prepare", "correct", "score", "prune"}
STUDY = {
    "title": "With a teacher or without",
    "claim": "A teacher helps.",
    "paper": "none",
    "set": {"random_baseline": False},
    "measures": {
        "before": {"about": "loss before", "model": "pruned"},
        "after": {"about": "loss after", "order": [["taught"], ["alone"]]},
    },
    "arms": {
        "taught": {"printed": {"after": 1.5}},
        "alone": {"set": {"distill.objective": "cross_entropy", "distill.lr": "{lr / 2}"}},
    },
}


def two_sources(material: Path, folder: Path) -> dict[str, Any]:
    """Return a recipe's `data` with each half of the corpus as a source."""
    lines = (material / "corpus.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", lines[::2]), ("other", lines[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    sources = [{"path": str(folder / f"{name}.jsonl"), "validation": 0.2} for name in ("one", "other")]
    return {"sequence": 16, "sources": sources, "repeat": True}


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_every_arm_of_every_study_passes_the_checks_of_a_run(
    name: str, recipe_file: Callable[..., Path], material: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(**{"data": two_sources(material, tmp_path)} if name == "phases" else {})
    plan = plan_study(name, load_study(name), recipe, out=tmp_path / "studies", seeds=1)
    for job in plan.jobs:
        check_job(job, planned(job.recipe, 1))
    made = [stage for _, runs in plan.executions() for run, stages in runs for stage in stages if run.until is None]
    assert len({job.recipe.out for job in plan.jobs}) == len(plan.jobs) == len(plan.study.arms)
    assert (made.count("prepare"), made.count("correct")) == (
        1 + (name in ("two-steps", "phases")),  # once for each model that is pruned
        3 if name == "correction" else 1,
    )


def conduct(
    recipe: Path, study: str | Path, out: Path, log: Path, array: str = "", kill_at: int = 0, seeds: int = 2
) -> None:
    """Run a study in this process. log: receives a line for each stage that was done. kill_at: kill -9 at this step of
    distillation, counted over all runs."""
    import torch

    from minitron_megatron.cli import running

    torch.set_num_threads(1)
    for name, stage in STAGES.items():
        STAGES._things[name] = replace(stage, does=counted(stage, log))  # type: ignore[assignment]
    seen = 0

    def listener(event: Event) -> None:
        nonlocal seen
        seen += event.label == "distill" and "lr" in event.values
        if kill_at and seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    running.raise_if_interrupted = listener
    run_study(str(study), recipe, [], out, seeds=seeds, array=array, dry_run=False)


def counted(stage: Stage, log: Path) -> Callable[..., Any]:
    def does(context: Any) -> Any:
        result = stage.does(context)
        with log.open("a") as file:
            file.write(stage.name + "\n")
        return result

    return does


def test_a_study_shares_stages_resumes_and_is_dealt_out(material: Path, tmp_path: Path) -> None:
    budget = {"tokens": 2 * 8 * 16, "save_every": 1, "validate_every": 1, "warmup_steps": 1}
    training, few = tiny_recipe(material)["distill"] | budget, {"samples": 8, "micro_batch": 8}
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "mine.yaml"
    keys = tiny_recipe(material) | {"correct": training, "distill": training, "score": few, "evaluate": few}
    keys |= {"out": str(tmp_path / "run")}
    recipe.write_text(yaml.safe_dump(keys))
    study.write_text(yaml.safe_dump(STUDY, sort_keys=False))

    def start(log: str, *more: Any) -> Any:
        process = FORKS.Process(target=conduct, args=(recipe, study, tmp_path / log, tmp_path / f"{log}.txt", *more))
        process.start()
        return process

    def end(process: Any) -> int | None:
        process.join(HANGS)
        return process.exitcode

    assert end(start("serial", "", 4)) == -signal.SIGKILL
    assert not (tmp_path / "serial" / "mine" / "table.json").exists()
    assert end(start("serial")) == 0
    tasks = [start("array", f"{task}/3") for task in range(3)]
    assert [end(task) for task in tasks] == [0, 0, 0]
    table = (tmp_path / "serial" / "mine" / "table.json").read_text()
    assert (tmp_path / "array" / "mine" / "table.json").read_text() == table
    for log in ("serial", "array"):
        done = (tmp_path / f"{log}.txt").read_text().split()
        assert {name: done.count(name) for name in done} == {
            **dict.fromkeys(SHARED, 2),  # once per seed
            **dict.fromkeys(("distill", "evaluate"), 4),
        }
    _expect_table(tmp_path / "serial" / "mine")


def _expect_table(folder: Path) -> None:
    """The table holds what the runs' summaries hold, and what follows from it."""
    taught, alone = read_json(folder / "table.json")["arms"]
    losses = {
        arm: [
            {row["model"]: row["loss_nats_per_token"] for row in read_json(folder / arm / f"seed-{seed}/summary.json")}
            for seed in (1, 2)
        ]
        for arm in ("taught", "alone")
    }
    assert taught["measures"]["after"]["values"] == [each["distilled"] for each in losses["taught"]]
    apart = [b["distilled"] - a["distilled"] for a, b in zip(*losses.values(), strict=True)]
    found = alone["measures"]["after"]
    assert found["difference"] == pytest.approx(sum(apart) / 2, abs=1e-12)
    assert found["signs"] == [sum(each < 0 for each in apart), sum(each > 0 for each in apart)]
    assert alone["measures"]["before"]["difference"] == 0.0
    assert alone["teacher_flops"] == 0 and taught["flops"] - alone["flops"] == taught["teacher_flops"] > 0
    assert list(taught["curve"]) == list(alone["curve"]) == ["1", "2"]
    lines = [
        line for line in (folder / "alone" / "seed-1" / "metrics.jsonl").read_text().splitlines() if "distill" in line
    ]
    assert not any("validation_kl" in line for line in lines)
    page = (folder / "table.md").read_text()
    assert "| taught |" in page and "1.5" in page and (folder / "table.png").is_file()


def test_an_arm_may_be_a_family_of_runs(material: Path, tmp_path: Path) -> None:
    """The model between is made once for both arms that have one, and its costs are theirs."""
    table, done = carried_out(of_few_steps(material), "two-steps", tmp_path)
    assert (done.count("correct"), done.count("distill"), done.count("prune")) == (1, 4, 3)
    one, two, taught_between = table["arms"]
    assert one["parameters"] == two["parameters"] == taught_between["parameters"]
    assert two["tokens"] == taught_between["tokens"] == one["tokens"] + 2 * 8 * 16
    assert two["flops"] > taught_between["flops"] > one["flops"]
    summary = read_json(tmp_path / "out/two-steps/two-steps-taught-by-the-largest/seed-1/last/summary.json")
    assert [summary[0]["model"], summary[-1]["model"]] == ["teacher", "distilled"]
    assert two["measures"]["after"]["values"] == [summary[-1]["loss_nats_per_token"]]


def carried_out(keys: dict[str, Any], study: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the table of a study of a recipe, with one seed, and the stages that were done."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys | {"out": str(folder / "run")}))
    told = (folder / "recipe.yaml", study, folder / "out", folder / "log.txt", "", 0, 1)
    process = FORKS.Process(target=conduct, args=told)
    process.start()
    process.join(HANGS)
    assert process.exitcode == 0
    return read_json(folder / "out" / study / "table.json"), (folder / "log.txt").read_text().split()


def of_few_steps(material: Path) -> dict[str, Any]:
    """Return a recipe whose trainings have two steps, with a validation each."""
    few = {"samples": 8, "micro_batch": 8}
    training = tiny_recipe(material)["distill"] | {"tokens": 2 * 8 * 16, "warmup_steps": 1, "validate_every": 1}
    keys = tiny_recipe(material) | {"correct": training, "distill": training, "score": few, "evaluate": few}
    return keys | {"prune": {"hidden": 32, "ffn": 48, "heads": 4}}


@pytest.mark.filterwarnings("ignore:the students of:UserWarning")
def test_candidates_are_ranked_at_every_validation(material: Path, tmp_path: Path) -> None:
    table, done = carried_out(of_few_steps(material), "candidates", tmp_path)
    ranks, arms = table["ranks"], {arm["arm"]: arm for arm in table["arms"]}
    assert done.count("distill") == len(arms) == len(ranks["of"]) == 8
    assert ranks["steps"] == [0, 1, 2] and ranks["with_last"][-1] == 1
    for at, loss in ((0, lambda arm: arm["measures"]["before"]["mean"]), (2, lambda arm: arm["curve"]["2"])):
        order = sorted(arms, key=lambda name: loss(arms[name]))
        assert [ranks["of"][name][at] for name in order] == [*range(1, 9)]
    page = (tmp_path / "out" / "candidates" / "table.md").read_text()
    assert "| arm | before | step 1 | step 2 |" in page and "| correlation with the last | " in page


def test_a_teacher_of_two_phases(material: Path, tmp_path: Path) -> None:
    """Its second phase is the correction; the student of both phases is pruned before it, and trained in each."""
    keys = of_few_steps(material) | {"data": two_sources(material, tmp_path)}
    table, done = carried_out(keys, "phases", tmp_path)
    assert (done.count("correct"), done.count("distill")) == (1, 4)
    final, both, first = table["arms"]
    assert final["parameters"] == both["parameters"] == first["parameters"]
    assert both["tokens"] > final["tokens"] == first["tokens"]
    out = tmp_path / "out" / "phases"
    run = read_json(out / "first-checkpoint-phases-1-and-2" / "seed-1" / "phase-2" / "summary.json")
    assert [row["model"] for row in run[:2]] == ["teacher", "corrected teacher"]
    assert both["measures"]["phase 2"]["values"] == [list(run[-1]["loss_by_source"].values())[1]]
    row = read_json(out / "first-checkpoint-phase-2" / "seed-1" / "summary.json")[-1]
    assert [first["measures"][f"phase {n}"]["values"] for n in (1, 2)] == [
        [each] for each in row["loss_by_source"].values()
    ]


def prepare_twice(topology: Topology, recipe: Path, folder: Path) -> None:
    for name in ("one", "other"):
        shared, keys = SharedStages(folder / "shared"), load_recipe(recipe, [], folder / name)
        run(keys, topology, until="prepare", shared=shared)


def test_several_ranks_share_a_stage(recipe_file: Callable[..., Path], pool: Pool, tmp_path: Path) -> None:
    pool.run(prepare_twice, recipe_file(), tmp_path, dp=2)
    (one, other) = (RunFolder(tmp_path / name) for name in ("one", "other"))
    assert read_json(one.record("prepare")) == read_json(other.record("prepare"))
    tokens = "0-corpus.train.bin"
    assert (one.data / tokens).stat().st_ino == (other.data / tokens).stat().st_ino
    assert not one.record("correct").exists()


def test_a_damaged_shared_stage_is_done_again(tmp_path: Path) -> None:
    stage = Stage("correct", lambda context: {}, makes=lambda run: run.model("corrected"), result=dict, reads=())
    one, other, shared = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other"), SharedStages(tmp_path / "shared")
    one.model("corrected").mkdir(parents=True)
    (one.model("corrected") / "weights").write_text("abc")
    one.metrics.write_text('{"stage": "correct", "done": 1}\n{"stage": "other", "done": 1}\n{"stage": "corr')
    record: Any = {"fingerprint": "f" * 64, "result": {}, "seconds": 1.0, "peak_bytes": 1}
    shared.give(stage, record, one)
    other.path.mkdir()
    other.metrics.write_text('{"stage": "trunc')
    with shared.claimed(stage, record["fingerprint"], silent):
        assert shared.take(stage, record["fingerprint"], other) == record
    assert (other.model("corrected") / "weights").stat().st_ino == (one.model("corrected") / "weights").stat().st_ino
    assert other.metrics.read_text() == '{"stage": "correct", "done": 1}\n'
    (other.model("corrected") / "weights").write_text("abd")
    with pytest.warns(UserWarning, match="weights has changed since it was written.* correct is done again"):
        assert shared.take(stage, record["fingerprint"], other) is None
    assert shared.take(stage, record["fingerprint"], other) is None


def test_what_is_no_study_is_one_message(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no study 'loses'\. Did you mean 'losses'\? Give one of aggregators, .*, or a YAML"
    ):
        load_study("loses")
    with pytest.raises(
        RecipeError, match=r"^the study correction needs correct in the recipe\. Set it, for example with"
    ):
        plan_study("correction", load_study("correction"), recipe_file(correct=None))
    for change, says in (
        ({"arm": {}}, "arm is not a known key"),
        ({"set": {"seed": 2}, "arms": {"a": {}, "b": {}}}, "A study cannot set seed"),
        ({"arms": {"a b": {}, "A-b": {}}}, "Two arms would have the folder 'a-b'"),
        ({"arms": {"a": {"printed": {"las": 1.0}}, "b": {}}}, "arms.a.printed names 'las', which is not there"),
    ):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(STUDY | {"measures": {"last": {"about": "x"}}} | change))
        with pytest.raises(RecipeError, match=says):
            load_study(str(tmp_path / "wrong.yaml"))
    (tmp_path / "typo.yaml").write_text(
        yaml.safe_dump(
            STUDY | {"arms": {"a": {}, "b": {"set": {"distil.lr": 1.0}}}} | {"measures": {"last": {"about": "x"}}}
        )
    )
    with pytest.raises(RecipeError, match=r"arm 'b' of the study typo.yaml: .*Did you mean"):
        plan_study("typo.yaml", load_study(str(tmp_path / "typo.yaml")), recipe_file())


def test_a_file_that_is_no_study_names_one_that_is(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a")
    with pytest.raises(
        RecipeError, match=rf"^study {path}: it is not a mapping of keys\. Start from a copy of (\S+)\.$"
    ) as caught:
        load_study(str(path))
    assert Path(str(caught.value).rpartition(" ")[2].rstrip(".")).is_file()


def test_a_model_that_each_run_would_import_is_refused(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_megatron.studies.jobs.is_megatron_checkpoint", lambda folder: True)
    path = recipe_file()
    recipe = load_recipe(path)
    with pytest.raises(RecipeError) as caught:
        plan_study("losses", load_study("losses"), path)
    assert str(caught.value) == (
        f"{recipe.model} is a Megatron checkpoint, which each run would import anew. Run `minitron prepare`, then use "
        f"`--set model={recipe.out}/imported-model`."
    )


def test_a_measure_that_the_summary_lacks_is_named() -> None:
    measure: Any = SimpleNamespace(model="distilled", column="loss")
    rows: Any = {"teacher": {"loss": 2.0}}
    with pytest.raises(RecipeError) as caught:
        _value(rows, measure, SimpleNamespace(models={}), "short")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "arm 'short' has no loss of the model 'distilled': its summary has teacher. Correct the study's measures."
    )


def test_an_arm_of_equal_size_needs_sizes() -> None:
    searched: Any = SimpleNamespace(search={}, student=None, family=[1])
    arm: Any = SimpleNamespace(match="ffn")
    with pytest.raises(RecipeError) as caught:
        _matched(searched, searched, arm, "narrow")
    assert str(caught.value) == "students of equal size need a recipe that gives the sizes. Give them in `prune`."


def test_values_in_braces_are_arithmetic_alone() -> None:
    names = {"layers": 9, "lr": 1e-3}
    value = {"a": ["{max(0, layers // 2 - 3)}:{layers - 1}", "{lr / 2}"], "b": "{range(layers // 3)}", "c": True}
    assert filled(value, names) == {"a": ["1:8", 5e-4], "b": [0, 1, 2], "c": True}
    known = "use numbers, + - * / //, min, max, round, range and the names layers, lr."
    for text in ("{layer}", "{layers ** 99}", "{__import__('os')}", "{layers.real}", "{'a'}"):
        with pytest.raises(RecipeError) as caught:
            filled(text, names)
        assert str(caught.value) == f"{text} cannot be computed: {known}"
    with pytest.raises(RecipeError, match=r"^\{layers / 0\} cannot be computed: division by zero\. Correct it\.$"):
        filled("{layers / 0}", names)


def test_the_sign_test_is_exact() -> None:
    assert [sign_test(*each) for each in ((3, 0), (0, 3), (2, 1), (5, 0), (0, 0))] == [0.25, 0.25, 1.0, 0.0625, None]


def test_the_page_lists_every_study_and_its_examples_are_some(
    recipe_file: Callable[..., Path],
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (ROOT / "docs" / "studies.md").read_text()
    assert describe_studies() in page
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    calibration = (ROOT / "examples" / "align" / "calibration.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(block)
    run_study(str(tmp_path / "mine.yaml"), recipe_file(), [], None, seeds=1, array="", dry_run=True)
    printed = capsys.readouterr().out
    assert "4 runs, " in printed and str(tmp_path / "run-studies" / "mine") in printed
    rows = plan_rows(plan_study("mine", load_study(str(tmp_path / "mine.yaml")), recipe_file(), seeds=1))
    assert [row[:3] for row in rows[:2]] == [
        ("KL", 1, ["prepare", "correct", "score", "prune", "distill", "evaluate"]),
        ("KL + CE", 1, ["distill", "evaluate"]),
    ]
    assert rows[0][3] > rows[1][3] > 0
    with pytest.raises(RecipeError, match="--array 2/2 is out of range: use 0/2 to 1/2"):
        run_study("losses", recipe_file(), [], None, seeds=1, array="2/2", dry_run=False)
    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 " * 99}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 20)
    (tmp_path / "corpus.jsonl").symlink_to(material / "corpus.jsonl")
    model = shutil.copytree(material / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    named = calibration.replace("runs/align-data/", "").replace("runs/corpus/prose", "corpus")
    (tmp_path / "text.yaml").write_text(named)
    plan = plan_study("text", load_study("text.yaml"), recipe_file(model=str(model)), seeds=1)
    for job in plan.jobs:
        check_job(job, planned(job.recipe, 1))
    assert [len(job.recipe.score.sources) for job in plan.jobs] == [0, 1, 2]
