"""Importance compared with random pruning, axis by axis, and the statistics compared: losses right after pruning.

    python benchmarks/importance_study.py examples/quickstart/recipe.yaml WORK [--set model=... --set score.samples=64]

Uses a recipe's model, data, calibration and validation. Each axis alone is pruned to the given share by importance,
by lowest index and by three random plans; then all axes at once by each of the nine statistics, which Minitron's
Table 11 compares on a 15B model. Writes each validation loss, in nats per token.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from record import record

from minitron_megatron.convert import load_hf
from minitron_megatron.evaluate import validation_loss
from minitron_megatron.events import silent
from minitron_megatron.files import read_json
from minitron_megatron.model import shape_of
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, first_plan, random_plan, trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import Plan, Statistic
from minitron_megatron.run import run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.score import score

SHARES = {"hidden": 3 / 4, "ffn": 1 / 2, "heads": 1 / 2}
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Importance against chance, right after the cut.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    topology, recipe = Topology.start(), load_recipe(args.recipe, args.overrides, args.work)
    run(recipe, topology, only="prepare")
    prepared = read_json(RunFolder(recipe.out).record("prepare"))["result"]
    context = Context(recipe, topology, silent, {"prepare": prepared}, "")
    calibration, held_out = context.calibration_batches(), context.held_out()
    teacher = load_hf(recipe.model, topology)
    shape = shape_of(teacher[0])

    def loss_of(plan: Plan) -> float:
        return validation_loss(trim(load_hf(recipe.model, topology), plan, topology), held_out, topology)["all"]

    def kept(axis: str) -> int:
        unit = shape.kv_groups if axis == "heads" else 1
        return max(unit, int(shape.axis_size(axis) * SHARES[axis]) // unit * unit)

    scores = score(teacher, calibration, topology=topology)
    by_axis: dict[str, dict[str, Any]] = {}
    for axis in SHARES:
        sizes = {axis: kept(axis)}
        drawn = [loss_of(random_plan(shape, seed, **sizes)) for seed in SEEDS]
        by_axis[axis] = {
            "kept": f"{kept(axis)} of {shape.axis_size(axis)}",
            "importance": loss_of(choose(scores, **sizes)),
            "first": loss_of(first_plan(shape, **sizes)),
            "random": drawn,
        }
        print(axis, by_axis[axis], flush=True)
    everything = {axis: kept(axis) for axis in SHARES}
    statistics = {}
    for batch, sequence in product(("l2", "mean", "var"), repeat=2):
        found = score(teacher, calibration, topology=topology, statistic=Statistic(batch, sequence))
        statistics[f"{batch}, {sequence}"] = loss_of(choose(found, **everything))
    record(
        "importance_study",
        model=recipe.model.name,
        whole=validation_loss(teacher, held_out, topology)["all"],
        samples=scores.samples,
        calibration_tokens=scores.tokens,
        axes=by_axis,
        all_axes=everything,
        statistics=statistics,
    )


if __name__ == "__main__":
    main()
