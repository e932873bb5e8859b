"""Command line as a user sees it: exit codes, one message, no traceback; and the commands that need no processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from minitron_megatron.cli import app
from minitron_megatron.cli.output import wrapped
from minitron_megatron.cli.printing import print_made
from minitron_megatron.errors import CheckpointError, RecipeError
from minitron_megatron.files import write_json
from minitron_megatron.recipe import load_recipe
from tests.limits import HANGS
from tests.warm import PYTHON, warm

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def call(*arguments: object, ranks: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    """more: additional environment variables."""
    start = [PYTHON, "-m", "minitron_megatron"] if ranks == 1 else [ROOT / "launch/local.sh", str(ranks)]
    command, environment = [*map(str, [*start, *arguments])], warm(ENVIRONMENT) | more
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)


def say(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_exit_2_and_one_message(recipe_file: Write, ranks: int) -> None:
    recipe = recipe_file()
    done = call("run", recipe, "--set", "prune.hiden=3", ranks=ranks)
    assert done.returncode == 2
    assert f"error: recipe {recipe}: prune.hiden is not" in done.stderr
    assert done.stderr.count("prune.hiden is not a known key. Did you mean 'hidden'?") == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["export", "RECIPE", "--to", "out", "--check"],
            "--check works only on the run's own export. Remove --to or --check.",
        ),
        (
            ["export", "RECIPE", "--checkpoint", "best"],
            "--checkpoint and --format need a separate folder. Give one with --to.",
        ),
        (
            ["export", "RECIPE", "--format", "megatron"],
            "--checkpoint and --format need a separate folder. Give one with --to.",
        ),
        (
            ["report", "run", "--to", "page"],
            "--to is the folder of a comparison of several runs. Give more runs, or leave it out.",
        ),
        (["estimate", "RECIPE", "--plan"], "--plan needs the number of GPUs. Give it with --gpus."),
        (
            ["estimate", "RECIPE", "--plan", "--mfu", "0.5"],
            "--plan models the time of a step, and --mfu assumes it. Give one of them.",
        ),
        (
            ["estimate", "RECIPE", "--plan", "--slurm"],
            "--plan prints a layout and --slurm the lines of a job. Give one of them.",
        ),
        (["study"], "give a study and a recipe: `minitron study NAME RECIPE`. `minitron study --list` has names."),
        (
            ["study", "losses"],
            "give a study and a recipe: `minitron study NAME RECIPE`. `minitron study --list` has names.",
        ),
    ],
)
def test_options_that_need_another_name_it(recipe_file: Write, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, [each.replace("RECIPE", str(recipe_file())) for each in arguments])
    assert isinstance(result.exception, RecipeError)
    assert str(result.exception) == said


def test_a_warning_is_one_line_and_libraries_show_no_bars() -> None:
    program = """
from minitron_megatron.cli.main import _quiet
_quiet()
import warnings, huggingface_hub.utils, tqdm
warnings.warn("the margin is small")
list(tqdm.tqdm([1]))
assert huggingface_hub.utils.are_progress_bars_disabled()  # transformers asks this too
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "warning: the margin is small\n")


def test_messages_end_their_lines_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    message = "error: distill.lr is -1: should be greater than 0, path/of/a/file-that-is-long.yaml says."

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert wrapped(message, io.StringIO()) == message
    assert wrapped(message, Terminal()).splitlines() == [
        "error: distill.lr is -1:",
        "should be greater than 0,",
        "path/of/a/file-that-is-long.yaml",
        "says.",
    ]


def test_an_error_that_only_the_models_know_is_one_message_too(recipe_file: Write) -> None:
    done = call("run", recipe_file(prune={"ffn": 33}), "--set", "parallel.tp=2", ranks=2)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: axis ffn has 33 units, which cannot be split over TP=2. Run with TP 1, or choose a multiple of 2."
    ]


def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(recipe_file: Write) -> None:
    recipe = recipe_file()
    command = [sys.executable, "-m", "minitron_megatron", "run", str(recipe)]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell starts background jobs with SIGINT ignored
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "preexec_fn": hears}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **options) as run:  # type: ignore[call-overload]
        record = load_recipe(recipe).out / "stages" / "prepare.json"
        until = time.monotonic() + HANGS
        while not record.exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=HANGS)
    assert run.returncode == 130
    assert "Run the same command again" in said
    assert "Traceback" not in said
    done = call("run", recipe)
    assert done.returncode == 0, done.stderr
    assert "distilled" in done.stdout
    assert (load_recipe(recipe).out / "report.html").is_file()


def test_a_schedulers_signal_saves_and_asks_to_be_requeued(recipe_file: Write) -> None:
    recipe = recipe_file(correct={"tokens": 400 * 8 * 16, "global_batch": 8, "micro_batch": 8, "warmup_steps": 2})
    out = load_recipe(recipe).out
    command = [sys.executable, "-m", "minitron_megatron", "run", str(recipe), "--set", "data.repeat=true"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) as run:  # type: ignore[call-overload]
        until = time.monotonic() + HANGS
        while not (out / "metrics.jsonl").exists() or '"stage": "correct"' not in (out / "metrics.jsonl").read_text():
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=HANGS)
    assert run.returncode == 75
    assert "Stopped by the scheduler's signal. Run the same command again to resume." in said
    assert list((out / "checkpoints").glob("*/step_*"))
    assert "resume" in call("run", recipe, "--dry-run", "--set", "data.repeat=true").stdout


def test_a_command_says_what_it_made_and_when_there_was_nothing_to_do(
    recipe_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file())
    status = {"stages": {"prepare": "ran"}, "since": 1.0, "ended": True, "why": "", "host": "h", "process": 1}
    sources = {"sources": {"a": {"tokens": 2214, "validation_tokens": 246}}}
    write_json(recipe.out / "stages" / "prepare.json", {"seconds": 1.0, "result": sources})
    write_json(recipe.out / "status.json", status)
    print_made(recipe, "prepare")
    made = f"prepare: 2,214 tokens, and 246 held out; in {recipe.out / 'data'}\n"
    assert capsys.readouterr().out == made
    write_json(recipe.out / "status.json", status | {"stages": {"prepare": "done"}})
    print_made(recipe, "prepare")
    assert capsys.readouterr().out == f"Nothing to do: the stage prepare is done already.\n{made}"


def test_init_makes_a_recipe_that_loads(material: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(say("init", material / "model"))
    recipe = load_recipe(path)
    assert recipe.model == material / "model"
    assert recipe.prune.hidden == 32  # 3/4 of 48 would be 36; rounded to a multiple of 16


def test_estimate_counts_what_is_built(recipe_file: Write) -> None:
    said = say("estimate", recipe_file(), "--gpus", "2")
    assert "parameters" in said and "on 2 H100 GPUs at 45% of 989 TFLOP/s" in " ".join(said.split())
    assert "MiB before activations" in said


def test_an_estimate_draws_bytes_by_kind_at_80_columns(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = say("estimate", recipe_file(), "--set", "parallel.pp=4").splitlines()
    assert max(map(len, lines)) <= 80
    bars = [line.split() for line in lines if "█" in line]
    assert len(bars) == 9 and bars[0][0] == "█" * 24 and bars[0][2] == "KiB"
    titles = [line for line in lines if "(predicted by formula)" in line]
    assert titles[-1].startswith("Memory by kind, without activations") and len(titles) == 2


def test_schema_is_a_json_schema() -> None:
    assert "prune" in json.loads(say("schema"))["properties"]


def test_dry_run_touches_nothing(recipe_file: Write) -> None:
    recipe = recipe_file()
    assert say("run", recipe, "--dry-run").split()[:2] == ["prepare", "run:"]
    assert not load_recipe(recipe).out.exists()


def test_show_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a scores file"):
        CliRunner().invoke(app, ["show", str(tmp_path)], catch_exceptions=False)


def test_shipped_recipes_are_valid() -> None:
    for path in (ROOT / "examples").rglob("*.yaml"):
        if "arms" in yaml.safe_load(path.read_text()):
            continue  # a study
        recipe = load_recipe(path)
        assert recipe.family or recipe.prune.sizes() or recipe.prune.layers, path
