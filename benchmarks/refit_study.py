"""Does a closed-form refit of the cut model survive distillation? Losses after cut and refit, and on the way.

    python benchmarks/refit_study.py examples/quickstart/recipe.yaml WORK --cut hidden=144,ffn=320 [--set model=...]

Takes the model, data, calibration and validation of a recipe; cuts are by importance. Each seed draws its calibration
samples, and the order of the training samples, anew. For each cut and seed the held-out loss after the cut and after
each method of refit is written; with `--steps` the students are distilled too, all on the same batches, at each of
`--lr`, and their held-out loss is written at `--points`. The first seed sweeps the rates; the others take each arm's
best. `--samples 16 64 256` refits on so many calibration samples instead, and distils nothing.

The arm `replaceme` (cuts of layers alone) is arXiv 2505.02819's: one linear map after the MLP before each dropped
block, merged into its output projection. `--untie` gives a teacher with tied embeddings an output layer of its own, of
the same weights, which a refit then repairs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import record
from safetensors.torch import load_file, save_file

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch, Corpus, calibration, calibration_batches, step_batches
from minitron_megatron.distill import KDObjective
from minitron_megatron.evaluate import validation_loss
from minitron_megatron.events import Event, silent
from minitron_megatron.files import read_json, write_json
from minitron_megatron.model import forward_only, shape_of
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import Plan
from minitron_megatron.refit import RIDGES, refit
from minitron_megatron.refit.solve import Problem, solve
from minitron_megatron.run import run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.score import score
from minitron_megatron.train import Training, train

ARMS = ("none", "outputs", "sequential", "replaceme")


@dataclass(frozen=True)
class Study:
    """One seed: its data, the teacher and a cut."""

    context: Context
    seed: int
    plan: Plan
    calibration: Sequence[Batch]
    teacher: Any

    @property
    def topology(self) -> Topology:
        return self.context.topology

    def student(self, arm: str) -> tuple[Any, float]:
        """(a student of the cut, seconds of its refit)."""
        model = trim(load_hf(self.context.recipe.model, self.topology), self.plan, self.topology)
        start = time.process_time()
        if arm == "replaceme":
            merge_maps(model, self.teacher, self.plan, self.calibration)
        elif arm != "none":
            refit(model, self.teacher, self.plan, self.calibration, self.topology, method=arm)  # type: ignore[arg-type]
        return model, time.process_time() - start

    def loss(self, model: Any) -> float:
        return validation_loss(model, self.context.held_out(), self.topology)["all"]

    def distilled(self, arm: str, lr: float, steps: int, points: Sequence[int]) -> dict[str, float]:
        """Step -> held-out loss of an arm, on a schedule of `steps`: warm-up over a tenth, cosine to a hundredth."""
        keys = self.context.recipe.distill
        student, _ = self.student(arm)
        curve = {"0": self.loss(student)}
        corpus = Corpus(
            self.context.blend,
            sequence=self.context.recipe.data.sequence,
            samples=steps * keys.global_batch,
            seed=self.seed,
            cache=self.context.folders.data / "index",
            repeat=True,
        )

        def batches(step: int) -> list[Batch]:
            share = {"micro_batch": keys.micro_batch, "dp_rank": 0, "dp": 1}
            return step_batches(corpus, step, global_batch=keys.global_batch, **share)

        def listen(event: Event) -> None:
            if event.done in points:
                curve[str(event.done)] = self.loss(student)

        objective = KDObjective(self.teacher, self.topology, vocab=shape_of(student[0]).vocab)
        training = Training(steps=steps, lr=lr, min_lr=lr / 100, warmup_steps=max(1, steps // 10))
        train(student, objective, batches, training, self.topology, listener=listen)
        return curve


@torch.no_grad()
def merge_maps(student: Any, teacher: Any, plan: Plan, batches: Sequence[Batch]) -> None:
    """Make up for dropped layers as ReplaceMe does, without parallelism.

    With M the MLP's output of the layer before a dropped block and X the teacher's residual streams: T of least squares
    with M T = M + X(after the block) - X(before it), of the ridge with the least error on an eighth of the tokens, and
    T is merged into the MLP's output projection.
    """
    layers = teacher[0].decoder.layers
    for number, (source, following) in enumerate(pairwise([*plan.kept_layers, len(layers)])):
        if following == source + 1:
            continue
        outputs: dict[str, list[torch.Tensor]] = {"mlp": [], "before": [], "after": []}
        watched = {"mlp": layers[source].mlp, "before": layers[source], "after": layers[following - 1]}
        hooks = [
            module.register_forward_hook(lambda _, __, found, kept=outputs[name]: kept.append(found[0]))
            for name, module in watched.items()
        ]
        for batch in batches:
            forward_only(teacher, [batch])
        for hook in hooks:
            hook.remove()
        mlp, before, after = (torch.cat([each.flatten(0, 1) for each in kept]).double() for kept in outputs.values())
        held_out = torch.arange(len(mlp)) % 8 == 7
        rows = [~held_out, held_out]
        gap = after - before
        problem = Problem(
            torch.stack([mlp[some].T @ mlp[some] for some in rows]),
            torch.stack([gap[some].T @ mlp[some] for some in rows]),
            torch.stack([gap[some].square().sum() for some in rows]),
        )
        step = solve(problem, RIDGES, lambda total: total).step
        if step is not None:
            weight = student[0].decoder.layers[number].mlp.linear_fc2.weight
            weight += (step @ weight.double()).to(weight.dtype)


def untied(model: Path, to: Path) -> Path:
    """Write a model with tied embeddings, one safetensors file, as one whose output layer has weights of its own."""
    shutil.copytree(model, to, dirs_exist_ok=True)
    config = read_json(model / "config.json")
    write_json(to / "config.json", config | {"tie_word_embeddings": False})
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, to / "model.safetensors")
    return to


def studies(args: argparse.Namespace, samples: int, sizes: dict[str, int], layers: Any) -> Callable[[int], Study]:
    topology, recipe = args.topology, load_recipe(args.recipe, args.overrides, args.work)
    run(recipe, topology, only="prepare")
    prepared = read_json(RunFolder(recipe.out).record("prepare"))["result"]
    context = Context(recipe, topology, silent, {"prepare": prepared}, lambda _: "")

    def of(seed: int) -> Study:
        corpus = calibration(
            context.blend,
            samples=samples,
            sequence=recipe.data.sequence,
            seed=seed,
            cache=context.folders.data / "index",
        )
        batches = calibration_batches(corpus, micro_batch=recipe.score.micro_batch, dp_rank=0, dp=1)
        teacher = load_hf(recipe.model, topology)
        found = score(teacher, batches, topology=topology)
        return Study(context, seed, choose(found, layers=layers, **sizes), batches, teacher)

    return of


def parsed(cut: str) -> tuple[dict[str, int], tuple[int, ...] | None]:
    """`hidden=144,ffn=320,layers=0.1.2` -> sizes, layers."""
    pairs = dict(pair.split("=") for pair in cut.split(","))
    layers = pairs.pop("layers", None)
    return {axis: int(size) for axis, size in pairs.items()}, (
        tuple(int(layer) for layer in layers.split(".")) if layers else None
    )


def untrained(args: argparse.Namespace, cut: str, samples: int) -> dict[str, Any]:
    """Arm -> held-out loss of each seed, and CPU seconds of the refits."""
    of = studies(args, samples, *parsed(cut))
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in args.seeds:
        study = of(seed)
        losses.setdefault("teacher", []).append(study.loss(study.teacher))
        for arm in args.arms:
            student, took = study.student(arm)
            losses.setdefault(arm, []).append(study.loss(student))
            seconds.setdefault(arm, []).append(took)
        print(cut, samples, seed, {arm: each[-1] for arm, each in losses.items()}, flush=True)
    return {"cut": cut, "samples": samples, "losses": losses, "cpu_seconds": seconds}


def trained(args: argparse.Namespace, cut: str) -> dict[str, Any]:
    """Arm -> rate -> curve of each seed; all rates of the first seed, each arm's best of the others."""
    of = studies(args, args.calibration, *parsed(cut))
    curves: dict[str, dict[str, list[dict[str, float]]]] = {arm: {} for arm in args.arms}
    best: dict[str, float] = {}
    for seed in args.seeds:
        study = of(seed)
        for arm in args.arms:
            for lr in [best[arm]] if arm in best else args.lr:
                curve = study.distilled(arm, lr, args.steps, args.points)
                curves[arm].setdefault(f"{lr:g}", []).append(curve)
                print(cut, seed, arm, lr, curve, flush=True)
            if arm not in best:
                best[arm] = min(args.lr, key=lambda lr: curves[arm][f"{lr:g}"][0][str(args.steps)])
    return {"cut": cut, "steps": args.steps, "best_lr": best, "curves": curves, "samples": args.calibration}


def main() -> None:
    parser = argparse.ArgumentParser(description="The refit of a cut model, before and after distillation.")
    parser.add_argument("recipe")
    parser.add_argument("work")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--cut", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--samples", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--points", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:3])
    parser.add_argument("--untie", action="store_true")
    args = parser.parse_args()
    args.recipe, args.work, args.topology = Path(args.recipe), Path(args.work), Topology.start()
    if args.untie:
        tied = load_recipe(args.recipe, args.overrides, args.work).model
        args.overrides.append(f"model={untied(Path(tied), args.work.with_name(f'{args.work.name}-untied'))}")
    for cut in args.cut:
        for samples in args.samples or ([] if args.steps else [args.calibration]):
            record("refit_study", model=_name(args), threads=torch.get_num_threads(), **untrained(args, cut, samples))
        if args.steps:
            record("refit_study", model=_name(args), threads=torch.get_num_threads(), **trained(args, cut))


def _name(args: argparse.Namespace) -> str:
    return Path(load_recipe(args.recipe, args.overrides, args.work).model).name


if __name__ == "__main__":
    main()
