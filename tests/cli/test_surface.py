"""The list of commands and flags; a change to it edits docs/architecture.md, section 9, and this test."""

from __future__ import annotations

from pathlib import Path

import typer

from minitron_megatron.cli import app

STAGE = {"--set", "--out"}
VERBS = {
    "run": STAGE | {"--dry-run"},
    "prepare": STAGE,
    "correct": STAGE,
    "score": STAGE,
    "search": STAGE | {"--task"},
    "prune": STAGE,
    "distill": STAGE,
    "baseline": STAGE,
    "evaluate": STAGE | {"--model"},
    "export": STAGE | {"--to", "--checkpoint", "--format", "--check"},
    "init": set(),
    "estimate": STAGE | {"--gpus", "--mfu", "--memory", "--slurm"},
    "bench": STAGE | {"--backend"},
    "show": set(),
    "report": set(),
    "watch": set(),
    "schema": set(),
}


def test_verbs_and_flags_are_these() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {flag for option in command.params for flag in option.opts if flag.startswith("--")} - {"--help"}
        for name, command in commands.items()
    }
    assert found == VERBS


def test_the_architecture_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    listed = page[page.index("## 9. The command line") : page.index("## 10.")].split("*(Planned)*")[0]
    for verb, flags in VERBS.items():
        assert verb in listed
        for flag in flags - STAGE:
            assert flag in listed
