"""Lines that submit a recipe: exact text for the presets, and quoting of strings with shell metacharacters."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_megatron.errors import TopologyError
from minitron_megatron.forecast import estimate, slurm_commands
from minitron_megatron.recipe import load_recipe
from tests.forecast.test_presets import CASES, GPUS, PRESETS, material_of

Write = Callable[..., Path]


@pytest.mark.parametrize(
    "gpus, hours, wanted",
    [
        (256, 40.0, "source slurm/cluster.env\nsbatch --nodes=32 --time=04:00:00 slurm/run.sbatch {}\n"),
        (8, 1.0, "source slurm/cluster.env\nsbatch --nodes=1 --time=01:30:00 slurm/run.sbatch {}\n"),
        (
            2,
            0.001,
            "export MINITRON_GPUS=2\nsource slurm/cluster.env\n"
            "sbatch --nodes=1 --time=00:15:00 --gpus-per-node=2 slurm/run.sbatch {}\n",
        ),
    ],
)
def test_the_lines(recipe_file: Write, gpus: int, hours: float, wanted: str) -> None:
    path = recipe_file()
    found = replace(estimate(load_recipe(path)), gpus=gpus, hours=hours)
    assert slurm_commands(path, [], found) == wanted.format(path)


@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_a_preset(name: str, tmp_path: Path) -> None:
    preset = PRESETS / f"{name}.yaml"
    found = estimate(load_recipe(preset, material_of(name, tmp_path)), gpus=GPUS)
    assert slurm_commands(preset, [], found) == (
        f"source slurm/cluster.env\nsbatch --nodes=32 --time=04:00:00 slurm/run.sbatch {preset}\n"
    )


NASTY = ['it\'s a "recipe"; $(touch broken) `touch broken`\n.yaml', "--set", "export.dtype=$(touch broken)\n'\""]


def test_no_argument_and_no_name_is_read_by_a_shell(recipe_file: Write, tmp_path: Path) -> None:
    """A real shell runs the printed lines; a stand-in for sbatch records its arguments."""
    path = recipe_file(NASTY[0])
    found = replace(estimate(load_recipe(path)), gpus=8)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "cluster.env").touch()
    (tmp_path / "sbatch").write_text('#!/bin/sh\nfor each; do printf "%s\\0" "$each"; done > given\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = slurm_commands(path, NASTY[1:], found)
    subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=environment, check=True)
    given = (tmp_path / "given").read_text().split("\0")[:-1]
    assert given[3:] == [str(path), *NASTY[1:]] and given[2] == "slurm/run.sbatch"
    assert not list(tmp_path.rglob("broken"))


def test_gpus_are_whole_nodes(recipe_file: Write) -> None:
    found = estimate(load_recipe(recipe_file()))
    with pytest.raises(TopologyError, match=r"^12 GPUs do not fill whole nodes of 8\. Give --gpus 16\.$"):
        slurm_commands(Path("recipe.yaml"), [], replace(found, gpus=12))
