"""Effect of light distillation on the ranking of candidates, and benefit of the search.

    python benchmarks/search_study.py WORK [--seeds 1 2 3]

Needs `make runs/corpus`. The quickstart's teacher, with a budget of about 60 % of its parameters. The six best
candidates right after pruning are distilled for 48 steps, and also two that need no search: the candidate with the most
parameters, and the best of those that prune only hidden and ffn, as in the papers. All candidates of a seed see the
same tokens; seeds differ in calibration samples and order of the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from record import record
from search_cost import RECIPE, SEARCH

from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import Progress
from minitron_megatron.run import run
from minitron_megatron.run.context import Context
from minitron_megatron.run.engine import results
from minitron_megatron.run.stages.search import _CandidateSearch
from minitron_megatron.search import rank_correlation, settled

STEPS, TOP = 48, 6
LIGHT = f"search.light={{top: {TOP}, tokens: {STEPS * 16 * 128}, measure_every: 8}}"


def study(folder: Path, seed: int, topology: Topology, progress: Progress) -> dict[str, Any]:
    keys = ["correct=null", "prune={}", SEARCH, LIGHT, f"seed={seed}", "score.samples=64"]
    recipe = load_recipe(RECIPE, keys, folder / f"seed-{seed}")
    for stage in ("prepare", "score"):
        run(recipe, topology, only=stage, listener=progress)
    work = _CandidateSearch(Context(recipe, topology, progress, results(recipe, "score"), lambda other: ""))
    first = {name: part["loss"] for name, part in work.after_cut().items()}
    best = sorted(first, key=lambda name: first[name])
    alone = [name for name in best if (work.candidates[name].shape.layers, work.candidates[name].shape.heads) == (8, 8)]
    others = {"largest": next(iter(work.candidates)), "hidden and ffn alone": alone[0]}
    parts = work.distilled(list(dict.fromkeys([*best[:TOP], *others.values()])))
    curves = {name: {int(step): loss for step, loss in part["curve"].items()} for name, part in parts.items()}
    top = {name: curves[name] for name in best[:TOP]}
    last = {name: curve[STEPS] for name, curve in curves.items()}
    winner = min(top, key=lambda name: last[name])
    return {
        "seed": seed,
        "after_cut": {name: first[name] for name in best[:TOP]},
        "distilled": {name: last[name] for name in top},
        "winner": [winner, last[winner]],
        "winner_was": best.index(winner) + 1,
        "after_cut_with_last": rank_correlation([first[name] for name in top], [last[name] for name in top]),
        "settled": settled(top),
        **{what: [name, last[name], best.index(name) + 1] for what, name in others.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A search over three seeds.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    topology = Topology.start()
    with Progress() as progress:
        found = [study(args.work, seed, topology, progress) for seed in args.seeds]
    record("search_study", steps=STEPS, top=TOP, seeds=found)


if __name__ == "__main__":
    main()
