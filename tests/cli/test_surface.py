"""The list of commands and flags; a change to it edits docs/architecture.md, section 9, and this test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from minitron_megatron import __version__
from minitron_megatron.cli import app
from tests.cli.test_commands import ENVIRONMENT
from tests.limits import HANGS

STAGE = {"--set", "--out"}
VERBS = {
    "run": STAGE | {"--dry-run"},
    "prepare": STAGE,
    "calibrate": STAGE,
    "correct": STAGE,
    "score": STAGE,
    "search": STAGE | {"--task"},
    "prune": STAGE,
    "distill": STAGE,
    "align": STAGE,
    "baseline": STAGE,
    "evaluate": STAGE | {"--model"},
    "sample": STAGE
    | {"--to", "--prompts", "--model", "--reward", "--reward-model", "--answers", "--temperature", "--top-p"}
    | {"--max-tokens", "--limit"},
    "export": STAGE | {"--to", "--checkpoint", "--format", "--check"},
    "init": {"--tokenizer"},
    "estimate": STAGE | {"--gpus", "--mfu", "--memory", "--plan", "--slurm"},
    "rehearse": STAGE | {"--gpus", "--gpu", "--memory", "--stage", "--report", "--json"},
    "bench": STAGE | {"--backend"},
    "study": STAGE | {"--seeds", "--array", "--dry-run", "--list"},
    "show": set(),
    "report": {"--to"},
    "watch": set(),
    "schema": set(),
}


IMPORTS = {
    "--help": "torch megatron transformers",
    "schema": "torch megatron transformers",
    "show": "megatron transformers lm_eval matplotlib",
}
"""Command -> packages that it does not need."""


@pytest.mark.parametrize("command", IMPORTS)
def test_a_command_imports_only_what_it_needs(command: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    words = [command, *([str(plan)] if command == "show" else [])]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minitron_megatron", *words],
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == (2 if command == "show" else 0), done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "minitron_megatron" in imported
    assert not imported & {*IMPORTS[command].split()}


def test_verbs_and_flags_are_these() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {flag for option in command.params for flag in option.opts if flag.startswith("--")} - {"--help"}
        for name, command in commands.items()
    }
    assert found == VERBS


def test_the_help_has_groups_and_the_version_is_printed() -> None:
    said = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    panels = [line.split()[1:-1] for line in said.splitlines() if line.startswith("╭")]
    assert [" ".join(word for word in panel if not word.startswith("─")) for panel in panels] == [
        "Options",
        "Run",
        "Single stages",
        "Plan",
        "Look",
    ]
    assert CliRunner().invoke(app, ["--version"]).output == f"minitron {__version__}\n"


def test_the_architecture_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    listed = page[page.index("## 9. The command line") : page.index("## 10.")].split("*(Planned)*")[0]
    for verb, flags in VERBS.items():
        assert verb in listed
        for flag in flags - STAGE:
            assert flag in listed
