"""Predicted decoding times compared with measured ones.

    python benchmarks/search_latency.py WORK

`minitron bench --backend torch` makes a search's table: the quickstart's teacher and five of its candidates, at two
batch sizes and two lengths. The fit to it predicts five other candidates, which are measured in the same way. Reports
the rank correlation of predicted and measured times, and the errors. One thread; medians of three.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from record import record
from search_cost import RECIPE, SEARCH

from minitron_megatron.convert import flat_config, read_config
from minitron_megatron.files import write_json
from minitron_megatron.forecast.candidates import speed_rows, untimed_candidates
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import bench
from minitron_megatron.search import Conditions, FittedSpeed, rank_correlation
from minitron_megatron.serve import Workload, measure_locally

LADDER, BATCHES = ((32, 32), (256, 64)), (1, 16)
OTHERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted beside measured decoding times.")
    folder = parser.add_argument("work", type=Path) and parser.parse_args().work
    torch.set_num_threads(1)
    rungs = [list(rung) for rung in LADDER]
    keys = ["correct=null", "prune={}", SEARCH, f"bench.ladder={rungs}", f"bench.batches={list(BATCHES)}"]
    recipe = load_recipe(RECIPE, keys, folder)
    bench(recipe, "torch")
    rows = speed_rows(folder / "bench" / "table.json")
    speed, config = FittedSpeed.to(rows), read_config(recipe.model)
    seen = {row.shape for row in rows}
    found = [each for each in untimed_candidates(recipe, config.shape) if each.shape not in seen]
    found = sorted(found, key=lambda each: (each.shape.layers, each.name))
    chosen = [found[at * (len(found) - 1) // (OTHERS - 1)] for at in range(OTHERS)]
    paths = [folder / "others" / each.name for each in chosen]
    for each, path in zip(chosen, paths, strict=True):
        write_json(path / "config.json", flat_config(replace(config, shape=each.shape), "bfloat16"))
    told = {}
    for inputs, outputs in LADDER:
        for batch in BATCHES:
            workload = Workload(inputs, outputs, batch, batch)
            measured = [found.token_ms or 0.0 for found in measure_locally(paths, workload)]
            at = Conditions(batch, inputs + outputs)
            predicted = [1000 * speed(each.shape, at) for each in chosen]
            errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
            told[f"{inputs}/{outputs}, batch {batch}"] = {
                "measured_ms": measured,
                "predicted_ms": predicted,
                "rank_correlation": rank_correlation(predicted, measured),
                "median_error": median(errors),
                "largest_error": max(errors),
            }
    record("search_latency", candidates=[each.name for each in chosen], rows=len(rows), fit=speed.coefficients, at=told)


if __name__ == "__main__":
    main()
