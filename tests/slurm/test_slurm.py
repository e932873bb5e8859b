"""Cluster scripts on a two-node Slurm: a run on both nodes, preemption, an array, quoting of arguments."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate, slurm_commands
from minitron_megatron.recipe import load_recipe
from tests.forecast.test_presets import CASES, PRESETS, material_of
from tests.limits import HANGS
from tests.recipes import tiny_recipe
from tests.slurm.cluster import lacks, running
from tests.warm import warm

Write = Callable[..., Path]
Environment = dict[str, str]
ROOT = Path(__file__).parents[2]
SCRIPTS = ("slurm/run.sbatch", "slurm/array.sbatch", "slurm/search.sbatch")
needs_slurm = pytest.mark.skipif(bool(lacks()), reason=lacks() or "there is one")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    root = tmp_path_factory.mktemp("slurm")
    with running(root) as environment:
        more = {"MINITRON_GPUS": "1", "GRACE_SECONDS": "3", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        yield warm(environment | more)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Folder from which jobs are submitted; of the project it has only the scripts."""
    for name in ("slurm", "launch"):
        shutil.copytree(ROOT / name, tmp_path / "home" / name)
    return tmp_path / "home"


def ask(slurm: Environment, *call: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(each) for each in call], env=slurm, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(slurm: Environment, home: Path, *arguments: object, **more: str) -> str:
    return ask(slurm | more, "sbatch", "--parsable", *arguments, cwd=home)


def state(slurm: Environment, job: str) -> dict[str, str]:
    words = ask(slurm, "scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + HANGS
    while not what():
        assert time.monotonic() < until
        time.sleep(0.2)


def hurried(slurm: Environment, job: str) -> dict[str, str]:
    """Return a job's state; a requeued job is started without Slurm's delay of two minutes."""
    found = state(slurm, job)
    if found["JobState"] == "PENDING" and found.get("Restarts", "0") != "0":
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], env=slurm, check=False)
    return found


def ended(slurm: Environment, job: str, home: Path, how: str = "COMPLETED") -> None:
    going = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED")
    wait_for(lambda: hurried(slurm, job)["JobState"] not in going)
    logs = "\n".join(path.read_text()[-2000:] for path in (*home.glob("*.log"), *home.glob("logs/*")))
    assert state(slurm, job)["JobState"] == how, logs


def table(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_json(out / "summary.json")]


LONG = {
    "tokens": 90 * 8 * 16,
    "global_batch": 8,
    "micro_batch": 4,
    "warmup_steps": 2,
    "lr": 5e-3,
    "validate_every": 90,
}


def steps(out: Path) -> int:
    """Return the steps of distillation in all runs of this folder."""
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count('"stage": "distill"') if metrics.exists() else 0


def launchers(node: int, out: Path) -> list[psutil.Process]:
    """Return the processes that a node runs for the run folder `out`, without Slurm's own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            said = " ".join(process.cmdline())
            if process.environ().get("SLURM_NODEID") == str(node) and f"{out}.yaml" in said and "launch/" in said:
                found.append(process)
    return found


@needs_slurm
def test_a_preempted_run_that_loses_a_node_ends_as_an_undisturbed_one(
    slurm: Environment, home: Path, recipe_file: Write
) -> None:
    keys: dict[str, Any] = {"correct": None, "random_baseline": False, "distill": LONG}
    keys["data"] = load_recipe(recipe_file()).data.model_dump(mode="json") | {"repeat": True}
    recipes = [recipe_file(f"{name}.yaml", out=str(home / name), parallel={"tp": 2}, **keys) for name in ("a", "b")]
    undisturbed = submit(slurm, home, "--nodes=2", "slurm/run.sbatch", recipes[0])
    ended(slurm, undisturbed, home)

    job, out = submit(slurm, home, "--nodes=2", "slurm/run.sbatch", recipes[1]), home / "b"
    wait_for(lambda: steps(out) > 20)
    urgent = submit(slurm, home, "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2")
    ended(slurm, urgent, home)
    assert list((out / "checkpoints").glob("*/step_*"))
    saved = steps(out)
    assert saved < 90
    wait_for(lambda: hurried(slurm, job)["JobState"] == "RUNNING" and steps(out) > saved)
    assert state(slurm, job)["Restarts"] == "1"

    for process in launchers(1, recipes[1].with_suffix("")):
        for each in (*process.children(recursive=True), process):
            each.kill()
    ended(slurm, job, home, "FAILED")
    assert not launchers(0, recipes[1].with_suffix(""))
    ended(slurm, submit(slurm, home, "--nodes=2", "slurm/run.sbatch", recipes[1]), home)
    assert table(home / "b") == table(home / "a")
    assert read_json(out / "versions.json")["processes"] == 2
    assert {path.name.rsplit("-", 1)[1] for path in home.glob("logs/*")} == {"node0.log", "node1.log"}


@needs_slurm
def test_an_array_reruns_what_was_killed_and_no_other(
    slurm: Environment, home: Path, recipe_file: Write, material: Path
) -> None:
    distill = tiny_recipe(material)["distill"] | {"tokens": 16 * 8 * 16}  # long enough to be killed
    recipe = recipe_file(correct=None, random_baseline=False, distill=distill)
    lines = [f"--out '{home}/candidate {ffn}' --set prune.ffn={ffn}" for ffn in (32, 40)]
    (home / "candidates.txt").write_text("".join(line + "\n" for line in lines))
    job = submit(slurm, home, "--array=0-1", "slurm/array.sbatch", "candidates.txt", "run", recipe)
    victim = home / "candidate 40" / "metrics.jsonl"
    wait_for(lambda: victim.exists() and '"stage": "distill"' in victim.read_text())
    ask(slurm, "scancel", f"{job}_1")
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job))
    done = {ffn: (home / f"candidate {ffn}" / "export").is_dir() for ffn in (32, 40)}
    assert done == {32: True, 40: False}
    before = (home / "candidate 32" / "summary.json").stat().st_mtime_ns
    again = submit(slurm, home, "--array=0-1", "slurm/array.sbatch", "candidates.txt", "run", recipe)
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", again))
    assert all((home / f"candidate {ffn}" / "export").is_dir() for ffn in (32, 40))
    assert before == (home / "candidate 32" / "summary.json").stat().st_mtime_ns


@needs_slurm
def test_a_search_is_spread_over_the_tasks_of_an_array(
    slurm: Environment, home: Path, recipe_file: Write, material: Path
) -> None:
    """One task is killed; the last job does its share."""
    light = {"top": 2, "tokens": 6 * 8 * 16, "measure_every": 3}
    distill = tiny_recipe(material)["distill"] | {"tokens": 2 * 8 * 16, "warmup_steps": 1}
    search = {"hidden": [32, 40], "ffn": [32, 48], "budget": {"params": 80_000}, "light": light}
    keys: dict[str, Any] = {
        "correct": None,
        "random_baseline": False,
        "prune": None,
        "search": search,
        "distill": distill,
    }
    recipes = [recipe_file(f"{name}.yaml", out=str(home / name), **keys) for name in ("alone", "spread")]
    ended(slurm, submit(slurm, home, "--nodes=1", "slurm/run.sbatch", recipes[0]), home)
    for stage in ("prepare", "score"):
        ended(slurm, submit(slurm, home, "--nodes=1", "slurm/run.sbatch", stage, recipes[1]), home)
    parts = home / "spread" / "search" / "parts"
    for wanted in (4, 4 + 1):
        job = submit(slurm, home, "--array=0-1", "slurm/search.sbatch", recipes[1])
        wait_for(lambda wanted=wanted: len(list(parts.rglob("*.json"))) >= wanted)
        if wanted > 4:
            ask(slurm, "scancel", f"{job}_1")
        wait_for(lambda job=job: not ask(slurm, "squeue", "-h", "-j", job))
    ended(slurm, submit(slurm, home, "--nodes=1", "slurm/run.sbatch", recipes[1]), home)
    tables = [read_json(home / name / "search" / "table.json") for name in ("alone", "spread")]
    assert tables[0] == tables[1] and table(home / "spread") == table(home / "alone")


EVIL = [
    "a b",
    "it's",
    '"',
    "$(touch broken)",
    "`touch broken`",
    "x;touch broken",
    "line\nbreak",
    "*",
    "--set",
    "a.b=$HOME",
]


@needs_slurm
def test_arguments_stay_arguments(slurm: Environment, home: Path) -> None:
    """Arguments with any characters pass unchanged through sbatch, srun, both launchers, and an array's file."""
    recorder = home / "python"
    recorder.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        + (
            "if sys.argv[1] == '-c':\n    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
            "json.dump(sys.argv[1:], open(os.environ['TO'] + os.environ['RANK'], 'w'))\n"
        )
    )
    recorder.chmod(0o755)
    more = {"PYTHON": str(recorder), "TO": str(home / "argv")}
    job = submit(slurm, home, "--nodes=2", "slurm/run.sbatch", "my recipe.yaml", *EVIL, **more)
    ended(slurm, job, home)
    for rank in (0, 1):
        assert json.loads((home / f"argv{rank}").read_text()) == [
            "-m",
            "minitron_megatron",
            "run",
            "my recipe.yaml",
            *EVIL,
        ]
    (home / "lines.txt").write_text("--set 'a=b c' \"--out\" $(touch broken) `touch broken` ;x\n")
    job = submit(slurm, home, "--array=0", "slurm/array.sbatch", "lines.txt", "prune", "r.yaml", **more)
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job))
    said = json.loads((home / "argv0").read_text())[2:]
    assert said == ["prune", "r.yaml", "--set", "a=b c", "--out", "$(touch", "broken)", "`touch", "broken`", ";x"]
    assert not list(home.rglob("broken"))


@needs_slurm
def test_slurm_accepts_the_scripts_as_they_are(slurm: Environment, home: Path) -> None:
    for script in SCRIPTS:
        ask(slurm, "sbatch", "--test-only", "--nodes=2", script, "x", cwd=home)


@needs_slurm
@pytest.mark.parametrize("name", [*CASES][:1])  # the lines differ in their numbers alone
def test_slurm_accepts_the_lines_of_a_preset(slurm: Environment, home: Path, tmp_path: Path, name: str) -> None:
    """Submit the printed lines on the available nodes."""
    preset = PRESETS / f"{name}.yaml"
    found = estimate(load_recipe(preset, material_of(name, tmp_path)), gpus=16)
    lines = slurm_commands(preset, [], found).replace("sbatch ", "sbatch --test-only ", 1)
    ask(slurm, "bash", "-e", "-c", lines, cwd=home)


def test_scripts_and_dockerfile_pass_their_linters() -> None:
    tools = Path(sys.executable).parent
    scripts = [
        *SCRIPTS,
        "slurm/body.sh",
        "slurm/cluster.env",
        *(f"launch/{n}.sh" for n in ("local", "node", "container")),
    ]
    for call in ([tools / "shellcheck", "-x", *scripts], [tools / "hadolint", "Dockerfile"]):
        done = subprocess.run([str(each) for each in call], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
