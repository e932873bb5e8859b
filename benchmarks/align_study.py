"""Success at held-out prompts of `examples/align`, from the distilled student through each round, over seeds.

    python benchmarks/align_study.py OUT [--seeds 3] [--sft ce mix]

An arm is a loss of the fine-tuning. Prints one line per arm and model: the share of sampled answers that do what the
prompt asks (4 answers to each of the held-out prompts at temperature 1): mean and standard deviation over the seeds,
the paired difference from the model before, and how many seeds it has the sign of; and the last round's distance
KL(start || model) in nats per response, on the pairs held out from it. Draws the curves of all seeds to
OUT/curves.png. Run `python examples/align/tasks.py runs/align-data` and `make runs/corpus` first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from minitron_megatron.align import AnswerSettings, make_pairs
from minitron_megatron.convert import load_hf
from minitron_megatron.errors import DataError
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import MetricsFile, read_metrics
from minitron_megatron.report.plots.style import COLOURS, legend_outside, new_figure
from minitron_megatron.run import SharedStages, run
from minitron_megatron.run_folder import RunFolder

EXAMPLE = Path(__file__).parents[1] / "examples" / "align"
MODELS = ("distilled", "aligned-1", "aligned-2", "aligned-3")
LABELS = {"distilled": "distilled", "aligned-1": "sft", "aligned-2": "rpo", "aligned-3": "rpo again"}
Curves = dict[str, list[list[dict[str, Any]]]]
"""Arm -> metrics of each seed's run."""


def success(folder: Path, tokenizer: Path, held_out: Path, topology: Topology) -> float:
    """Return the mean reward of a model's answers to the held-out prompts."""
    settings = AnswerSettings(prompts=str(held_out), reward="follows", answers=4, max_tokens=16, micro_batch=64)
    with TemporaryDirectory() as scratch:
        where = (tokenizer, Path(scratch) / "pairs.jsonl", Path(scratch) / "parts")
        try:
            return make_pairs(load_hf(folder, topology), topology, settings, *where, seed=7)["mean_reward"]
        except DataError:  # no pair: all answers to every prompt have the same reward
            parts = [json.loads(path.read_text()) for path in sorted(where[2].rglob("*.json"))]
            return mean(reward for part in parts for each in part for reward in each["rewards"])


def aligned(recipe: Path, topology: Topology, shared: SharedStages) -> list[dict[str, Any]]:
    """Run a recipe up to its last round; return its metrics, also those of an earlier call.

    shared: arms share what they have in common, such as distillation.
    """
    loaded = load_recipe(recipe)
    metrics = RunFolder(loaded.out).metrics
    run(loaded, topology, until="align", shared=shared, listener=MetricsFile(metrics))
    return read_metrics(metrics)


def curve(metrics: Sequence[Mapping[str, Any]], stage: str, name: str) -> tuple[list[float], list[float]]:
    """Return (shares of a stage that are done, values of a metric there)."""
    lines = [line for line in metrics if line["stage"] == stage and name in line]
    return [line["done"] / line["total"] for line in lines], [line[name] for line in lines]


def draw(success: Mapping[str, Mapping[str, Sequence[float]]], curves: Curves, path: Path) -> None:
    """Plot each arm's success after each round, and two measures of its rounds on pairs: a line for each seed.

    success: arm -> model -> value of each seed. Of the rounds on pairs lines are running means over a tenth of the
    steps, dots the pairs that were held out.
    """
    panels = {
        "preference_accuracy": ("Pairs whose chosen response gained more", "share of pairs"),
        "kl_to_reference": ("Distance from the start of the round", "KL (nats per response)"),
    }
    with new_figure(path, 9.0, 7.2) as figure:
        column = figure.subplots(1 + len(panels), 1)
        column[0].set(title="Success at held-out prompts", ylabel="share of answers", ylim=(0, 1))
        for axes, (title, label) in zip(column[1:], panels.values(), strict=True):
            axes.set(title=title, ylabel=label, xlabel="rounds of RPO, each from the model before")
        for arm, colour in zip(success, COLOURS, strict=False):
            by_seed = list(zip(*success[arm].values(), strict=True))
            for seed, values in enumerate(by_seed):
                column[0].plot(LABELS.values(), values, "o-", markersize=3.5, color=colour, label=arm * (not seed))
            for metrics in curves[arm]:
                for axes, name in zip(column[1:], panels, strict=True):
                    for number, stage in enumerate(("align-2", "align-3")):
                        done, values = curve(metrics, stage, name)
                        axes.plot([number + at for at in done], smooth(values), color=colour, linewidth=1)
                        done, values = curve(metrics, stage, f"validation_{name}")
                        axes.plot([number + at for at in done], values, "o", markersize=4, color=colour)
        legend_outside(column[0])


def smooth(values: Sequence[float]) -> list[float]:
    reach = len(values) // 20
    return [mean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft", nargs="+", default=["ce", "mix"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    topology = Topology.start()
    keys = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text())
    arms: dict[str, dict[str, list[float]]] = {}
    curves: Curves = {}
    for loss in asked.sft:
        found = arms[loss] = {model: [] for model in MODELS}
        curves[loss] = []
        for seed in range(1, asked.seeds + 1):
            out = asked.out / f"{loss}-{seed}"
            rounds = [keys["align"][0] | {"loss": loss}, *keys["align"][1:]]
            file = asked.out / f"{loss}-{seed}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(keys | {"out": str(out), "seed": seed, "align": rounds, "plugins": []}))
            curves[loss].append(aligned(file, topology, SharedStages(asked.out / "shared")))
            data = Path(keys["model"])
            for model in MODELS:
                found[model].append(success(out / model, data, data.parent / "held_out.jsonl", topology))
            print(f"{loss} seed {seed}: " + ", ".join(f"{LABELS[m]} {found[m][-1]:.3f}" for m in MODELS), flush=True)
        before = None
        for model, rates in found.items():
            line = f"{loss} {LABELS[model]}: {mean(rates):.3f} +- {stdev(rates):.3f}"
            if before is not None:
                steps = [new - old for new, old in zip(rates, before, strict=True)]
                line += (
                    f", {mean(steps):+.3f} from the model before ({sum(step > 0 for step in steps)} of {len(steps)} up)"
                )
            print(line, flush=True)
            before = rates
        far = [curve(metrics, "align-3", "validation_kl_to_reference")[1][-1] for metrics in curves[loss]]
        print(f"{loss}: KL(start || model) of the last round {mean(far):.2f} nats a response", flush=True)
    draw(arms, curves, asked.out / "curves.png")


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLE))
    import tasks  # noqa: F401 (adds the reward)

    main()
