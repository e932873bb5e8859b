"""The lines that submit a recipe: the presets' word for word, and strings that a shell must not read."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_megatron.errors import TopologyError
from minitron_megatron.recipe import estimate, load_recipe, slurm_commands

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


def test_no_argument_is_read_by_a_shell(recipe_file: Write) -> None:
    path, nasty = recipe_file(), ["--set", "export.dtype=$(touch x); `id` 'a b'\n\"c\""]
    last = slurm_commands(path, nasty, replace(estimate(load_recipe(path)), gpus=8)).split("\n", 1)[1]
    assert shlex.split(last)[-2:] == nasty


def test_gpus_are_whole_nodes(recipe_file: Write) -> None:
    found = estimate(load_recipe(recipe_file()))
    with pytest.raises(TopologyError, match="12 GPUs are not whole nodes of 8"):
        slurm_commands(Path("recipe.yaml"), [], replace(found, gpus=12))
