"""Cost of measuring a search's candidates, compared with pruning and evaluating each candidate separately.

    python benchmarks/search_cost.py WORK

Needs `make runs/corpus`. The quickstart's teacher, with a budget of about 60 % of its parameters. The stage measures
candidates from one loaded teacher. The comparison, for each candidate: load the teacher, prune it, write a Hugging Face
folder, load that and measure it on the same samples, in this process; and for a few candidates, by `minitron prune` and
`minitron evaluate --model` in processes of their own. Bounds: losses differ by at most 1e-5, time at most 0.3 of the
separate one, live tensors at most the teacher and 1.2 of the largest candidate. A candidate's two times are measured
one after the other; ratio of the sums, one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import record

from minitron_megatron.convert import load_hf, save_hf
from minitron_megatron.data import calibration_batches
from minitron_megatron.evaluate import validation_loss
from minitron_megatron.layout import parameters
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import run
from minitron_megatron.run.context import Context
from minitron_megatron.run.engine import results
from minitron_megatron.run.stages.search import _Work
from minitron_megatron.search import zero_shot
from minitron_megatron.testing import LivePeak

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart" / "recipe.yaml"
SEARCH = (
    "search={layers: [5, 6, 7, 8], hidden: {from: 128, to: 192, step: 16}, ffn: {from: 192, to: 480, step: 32}, "
    "heads: [4, 8], budget: {params: [2.0e6, 2.3e6]}, light: null}"
)
BY_HAND = 4
"""Number of candidates that are also measured through the command line."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description="The zero-shot stage beside separate candidates.")
    parser.add_argument("work", type=Path)
    folder = parser.parse_args().work
    torch.set_num_threads(1)
    topology = Topology.start()
    overrides = ["correct=null", "prune={}", SEARCH, "evaluate.samples=128"]
    recipe = load_recipe(RECIPE, overrides, folder / "run")
    for stage in ("prepare", "score"):
        run(recipe, topology, only=stage)
    context = Context(recipe, topology, print_progress, results(recipe, "score"), lambda other: "")
    work = _Work(context)
    names = list(work.candidates)
    batches = calibration_batches(context.calibration(), micro_batch=recipe.score.micro_batch, dp_rank=0, dp=1)
    teacher = context.load_prune_source()

    def separate(name: str) -> float:
        path, student = folder / "separate", trim(load_hf(recipe.model, topology), work.plan(name), topology)
        save_hf(student, path, topology, files_from=recipe.model)
        return validation_loss(load_hf(path, topology), {"": batches}, topology)["all"]

    pairs, apart = [], 0.0
    for name in names:
        mine, found = timed(lambda name=name: zero_shot(teacher, [name], work.plan, batches, topology=topology))
        theirs, loss = timed(lambda name=name: separate(name))
        pairs.append((mine, theirs))
        apart = max(apart, abs((found[name]["loss"] or 0.0) - loss))
    whole = [each for each in work.candidates.values() if each.shape.layers == 8]  # no layers to choose
    by_hand = [through_processes(folder / "by-hand", each) for each in whole[:: len(whole) // BY_HAND]]
    sums = [sum(each) for each in zip(*pairs, strict=True)]
    single = [median(each) for each in zip(*pairs, strict=True)]
    largest = 4 * parameters(work.candidates[names[0]].shape)
    record(
        "search_cost",
        candidates=len(names),
        samples=recipe.score.samples,
        largest_loss_difference=apart,
        over_separate_in_this_process=sums[0] / sums[1],
        over_separate_by_the_command_line=single[0] / median(by_hand),
        by_the_command_line=len(by_hand),
        bound=0.3,
        peak_over_largest_candidate={
            f"micro-batch {micro}": peak(teacher, work, context, micro, topology) / largest for micro in (1, 16)
        },
        peak_bound=1.2,
    )


def peak(teacher: Any, work: _Work, context: Context, micro: int, topology: Topology) -> int:
    """Return live bytes beyond the teacher while the three largest candidates are measured one after another."""
    batches = calibration_batches(context.calibration(), micro_batch=micro, dp_rank=0, dp=1)[:4]
    with LivePeak() as meter:
        zero_shot(teacher, list(work.candidates)[:3], work.plan, batches, topology=topology)
    return meter.extra


def through_processes(out: Path, candidate: Any) -> float:
    """Return the seconds of `minitron prune` and `minitron evaluate --model`, with existing scores."""
    sizes = {axis: size for axis, size in candidate.sizes.items() if axis != "layers"}
    flags = ["--set", "correct=null", "--set", f"prune={sizes}", "--set", "evaluate.samples=128", "--out", str(out)]

    def call(*verb: str) -> None:
        command = [sys.executable, "-m", "minitron_megatron", verb[0], str(RECIPE), *verb[1:], *flags]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)

    if not (out / "scores").exists():
        call("prepare")
        call("score")
    return timed(lambda: (call("prune"), call("evaluate", "--model", str(out / "pruned"))))[0]


def print_progress(event: Any) -> None:
    print(f"{event.label} {event.done}/{event.total}", file=sys.stderr)


if __name__ == "__main__":
    main()
