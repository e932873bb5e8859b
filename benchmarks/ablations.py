"""The papers' ablations in miniature: teacher, starting point, loss, and hidden states.

    python benchmarks/ablations.py WORK [--seeds 1 2 3]

Needs `make runs/corpus`. Each variant changes one setting of the quickstart's recipe; within a seed all see the same
tokens in the same order. Writes the held-out losses after the last step (mean and spread over the seeds), and plots
them over the steps to `results/ablations.svg`. Finished variants are not repeated, so the script can be interrupted.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from record import RESULTS, record

from minitron_megatron.files import read_json, write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import MetricsFile, Progress, fan_out, read_metrics
from minitron_megatron.run import run
from minitron_megatron.run.engine import wanted

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart" / "recipe.yaml"
FULL, LM = "forward KL", "importance pruning + LM loss"
DEPTH = ("prune.hidden=null", "prune.ffn=null", "prune.layers=[0,1,2,3]")
"""The first half of the layers, as in the paper's Table 17."""


def _loss(divergence: str, ce_weight: float) -> tuple[str, str]:
    return f"distill.loss.divergence={divergence}", f"distill.loss.ce_weight={ce_weight}"


def _states(outputs: str, embedding: bool) -> str:
    return f"distill.states={{outputs: ['{outputs}'], embedding: {str(embedding).lower()}}}"


VARIANTS: Mapping[str, Sequence[str]] = {
    FULL: (),
    "uncorrected teacher": ("correct=null",),
    "continuously corrected teacher": ("correct.continuous=true",),
    "random init + KD": ("random_baseline=true",),
    "random pruning + KD": ("prune.by=random",),
    LM: (),
    "forward KL + CE": _loss("forward_kl", 1.0),
    "reverse KL + CE": _loss("reverse_kl", 1.0),
    "cosine + CE": _loss("cosine", 1.0),
    "MSE + CE": _loss("mse", 1.0),
    "forward KL + L_o(5:5) + L_emb": (_states("5:5", True),),
    "depth: forward KL": DEPTH,
    "depth: reverse KL": (*DEPTH, *_loss("reverse_kl", 0.0)),
    "depth: + L_o(5:1)": (*DEPTH, _states("5:1", False)),
    "depth: + L_o(5:1) + L_emb": (*DEPTH, _states("5:1", True)),
    "depth: + L_o(7:3) + L_emb": (*DEPTH, _states("7:3", True)),
}

FIGURES: Mapping[str, Sequence[str]] = {
    "Teacher correction ([B] Fig 4, 5)": (FULL, "uncorrected teacher", "continuously corrected teacher"),
    "Start and loss ([B] Fig 6)": (FULL, "random init + KD", "random pruning + KD", LM),
    "Losses ([A] Table 15)": (FULL, "forward KL + CE", "reverse KL + CE", "cosine + CE", "MSE + CE"),
    "States, width cut ([A] Table 18)": (FULL, "forward KL + L_o(5:5) + L_emb"),
    "States, depth cut ([A] Table 16, 17)": tuple(name for name in VARIANTS if name.startswith("depth")),
}

Curve = list[dict[str, float]]
"""Validations of a variant: `step`, `validation_loss` and, with a teacher, `validation_kl`, in nats per token."""


def curve(name: str, seed: int, work: Path, topology: Topology, progress: Progress) -> Curve:
    """Train a variant unless it is done, and return its curve."""
    kept = work / f"{seed}" / f"{name}.json"
    if not kept.is_file():
        write_json(kept, _trained(name, seed, work / f"{seed}" / "at work", topology, progress))
    return read_json(kept)


def _trained(name: str, seed: int, out: Path, topology: Topology, progress: Progress) -> Curve:
    base, label = out.with_name("base"), {"random init + KD": "baseline", LM: "correct"}.get(name, "distill")

    def go_to(stage: str, folder: Path, *overrides: str) -> None:
        recipe = load_recipe(RECIPE, [f"seed={seed}", "random_baseline=false", *overrides], folder)
        names = [each.name for each in wanted(recipe)]
        for each in names[: names.index(stage) + 1]:
            run(recipe, topology, only=each, listener=fan_out(progress, MetricsFile(folder / "metrics.jsonl")))

    go_to("prune", base)
    shutil.rmtree(out, ignore_errors=True)
    if name == LM:  # correcting the pruned model means training it by cross-entropy
        keys = load_recipe(RECIPE).distill.model_dump()
        same = [f"correct.{key}={keys[key]}" for key in ("tokens", "lr", "min_lr", "validate_every")]
        go_to(label, out, f"model={base / 'pruned'}", *same)
    else:
        shutil.copytree(base, out, ignore=shutil.ignore_patterns("metrics.jsonl"))
        go_to(label, out, *VARIANTS[name])
    validated = [line for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line]
    shutil.rmtree(out)
    keep = ("validation_loss", "validation_kl")
    return [
        {"step": line["done"], **{key: line[key] for key in keep if key in line}}
        for line in validated
        if line["stage"] == label
    ]


def draw(found: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Plot one panel per question: mean over the seeds, and their range as a band."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(5 * len(FIGURES), 4.5), layout="constrained")
    for axis, (title, names) in zip(axes, FIGURES.items(), strict=True):
        for name in names:
            steps = [point["step"] for point in found[name][0]]
            by_step = list(zip(*([point["validation_loss"] for point in each] for each in found[name]), strict=True))
            (line,) = axis.plot(steps, [mean(values) for values in by_step], marker=".", label=name)
            bounds = [min(values) for values in by_step], [max(values) for values in by_step]
            axis.fill_between(steps, *bounds, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="step", ylabel="validation loss (nats per token)")
        axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="The papers' ablations in miniature.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    topology, found = Topology.start(), {name: [] for name in VARIANTS}
    with Progress() as progress:
        for seed in args.seeds:
            for name in VARIANTS:
                found[name].append(curve(name, seed, args.work, topology, progress))
    draw(found, RESULTS / "ablations.svg")

    def summary(key: str) -> dict[str, Any]:
        last = {name: [each[-1][key] for each in curves if key in each[-1]] for name, curves in found.items()}
        return {
            name: {"mean": mean(values), "spread": max(values) - min(values), "seeds": values}
            for name, values in last.items()
            if values
        }

    record(
        "ablations",
        seeds=args.seeds,
        threads=torch.get_num_threads(),
        steps=found[FULL][0][-1]["step"],
        loss=summary("validation_loss"),
        divergence=summary("validation_kl"),
    )


if __name__ == "__main__":
    main()
