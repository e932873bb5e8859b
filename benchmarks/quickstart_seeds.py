"""The quickstart over several seeds, with and without teacher correction.

    python benchmarks/quickstart_seeds.py WORK [--seeds 1 2 3]

Needs `make runs/corpus`. Runs the quickstart's recipe with and without correction for each seed, and writes every
validation loss. Finished runs are not repeated. Claims to check: distilled < pruned; distilled < random init at equal
tokens, by more than the spread; and a corrected teacher gives a lower distilled loss, or by how much it does not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from record import record

from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import MetricsFile, Progress, fan_out
from minitron_megatron.run import run

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart" / "recipe.yaml"


def losses(out: Path, overrides: list[str], topology: Topology, progress: Progress) -> dict[str, float]:
    """Return model -> nats per token on the held-out prose."""
    recipe = load_recipe(RECIPE, overrides, out)
    run(recipe, topology, listener=fan_out(progress, MetricsFile(out / "metrics.jsonl")))
    return {row["model"]: row["loss_nats_per_token"] for row in read_json(out / "summary.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over seeds, with and without correction.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    topology = Topology.start()
    found: dict[str, list[float]] = {}
    with Progress() as progress:
        for seed in args.seeds:
            with_it = losses(args.work / f"corrected-{seed}", [f"seed={seed}"], topology, progress)
            plain = ["correct=null", "random_baseline=false"]
            without = losses(args.work / f"plain-{seed}", [f"seed={seed}", *plain], topology, progress)
            with_it["distilled, uncorrected teacher"] = without["distilled"]
            for model, loss in with_it.items():
                found.setdefault(model, []).append(loss)
    record(
        "quickstart_seeds",
        seeds=args.seeds,
        threads=torch.get_num_threads(),
        losses=found,
        mean={model: mean(values) for model, values in found.items()},
        spread={model: max(values) - min(values) for model, values in found.items()},
    )


if __name__ == "__main__":
    main()
