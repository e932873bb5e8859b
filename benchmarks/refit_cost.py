"""Cost of a refit of all sites, over one scoring pass on the same tokens and over the memory that `estimate` counts;
and of a search's refits, alone and with shared moments.

    python benchmarks/refit_cost.py [--tokens 4096 8192 16384]

A Llama of 4 layers, hidden 256 to 192 and ffn 768 to 512, in float32, samples of 256 tokens, by both methods. Aims:
CPU time of 6 scoring passes or less, and a peak of live memory within 10 % of `estimate`'s bytes of a refit with the
states it keeps on the host. Each repeat runs score, refit, score and divides by the mean of the two; one thread;
median of the repeats. Memory is metered once, in a refit of its own. The search has four candidates of the whole
hidden size, by `outputs`; its refits are measured in turn, alone and with shared moments.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any, get_args

import torch
from clock import seconds
from record import record

from minitron_megatron.data import Batch
from minitron_megatron.forecast.refit_cost import (
    host_bytes,
    refit_bytes,
    refit_flops,
    shared_bytes,
    shared_flops,
    shared_host_bytes,
)
from minitron_megatron.layout import Shape, flops_per_token
from minitron_megatron.model import Chunk, ModelConfig, build, fill_initial
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim, trimmed_view
from minitron_megatron.recipe import Recipe
from minitron_megatron.refit import Method, SharedMoments, refit, shared_sites
from minitron_megatron.score import score
from minitron_megatron.testing import live_peak

SHAPE = Shape(layers=4, hidden=256, ffn=768, heads=8, kv_groups=4, head_dim=32, vocab=512)
SEQUENCE, MICRO_BATCH, REPEATS = 256, 4, 5
CANDIDATES = {
    "ffn": [{"ffn": size} for size in (640, 512, 384, 256)],
    "heads and ffn": [{"heads": 4, "ffn": size} for size in (768, 640, 512, 384)],
}


def recipe_of(method: str, samples: int) -> Recipe:
    """The recipe that `estimate` would count."""
    return Recipe.model_validate(
        {
            "model": "teacher",
            "out": "runs/refit-cost",
            "dtype": "float32",
            "data": {"sequence": SEQUENCE, "sources": [{"path": "text"}]},
            "score": {"micro_batch": MICRO_BATCH},
            "prune": {"hidden": 192, "ffn": 512, "refit": method, "refit_samples": samples},
            "distill": {"tokens": SEQUENCE},
        }
    )


def filled(topology: Topology) -> list[Chunk]:
    model = build(ModelConfig(SHAPE), topology)
    fill_initial(model, topology, seed=0)
    return model


def batches_of(tokens: int) -> list[Batch]:
    drawn = torch.randint(SHAPE.vocab, (tokens // SEQUENCE, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    return [
        Batch(some[:, :-1], some[:, 1:], torch.ones(len(some), SEQUENCE, dtype=torch.bool))
        for some in drawn.split(MICRO_BATCH)
    ]


def weight_bytes(*models: list[Chunk]) -> int:
    return sum(4 * p.numel() for model in models for p in model[0].parameters())


def measured(method: Method, tokens: int, topology: Topology) -> dict[str, Any]:
    teacher, *others = (filled(topology) for _ in range(REPEATS + 2))
    batches = batches_of(tokens)
    plan = random_plan(SHAPE, 0, hidden=192, ffn=512)
    students = [trim(model, plan, topology) for model in others]
    unused = iter(students)

    def scored() -> None:
        score(teacher, batches, topology=topology)

    def repaired() -> None:
        refit(next(unused), teacher, plan, batches, topology, method=method)

    scored()
    peak = live_peak(repaired)
    ratios = []
    for _ in range(REPEATS):
        (_, before), (_, taken), (_, after) = seconds(scored), seconds(repaired), seconds(scored)
        ratios.append(2 * taken / (before + after))
    recipe = recipe_of(method, tokens // SEQUENCE)
    forward, exact = refit_flops(recipe, SHAPE, plan.target)
    counted = refit_bytes(recipe, SHAPE, plan.target) - weight_bytes(teacher, students[0])
    counted += host_bytes(recipe, SHAPE, plan.target, 1)
    return {
        "method": method,
        "tokens": tokens,
        "over_scoring": median(ratios),
        "spread": [min(ratios), max(ratios)],
        "flops_over_scoring": (forward + exact) / (tokens * flops_per_token(SHAPE, SEQUENCE)),
        "peak_bytes": peak,
        "peak_over_estimate": peak / counted,
    }


def searched(axes: str, tokens: int, topology: Topology) -> dict[str, Any]:
    """Refits of four candidates: seconds with shared moments over seconds without, and FLOPs alike."""
    teacher, batches = filled(topology), batches_of(tokens)
    plans = [random_plan(SHAPE, 0, **sizes) for sizes in CANDIDATES[axes]]  # type: ignore[arg-type]
    shapes = [plan.target for plan in plans]
    sites = shared_sites("outputs", SHAPE, shapes)

    def refitted(*, together: bool) -> None:
        shared = SharedMoments(teacher, batches, topology, sites) if together else None
        for plan in plans:
            student = trimmed_view(teacher, plan, topology)
            refit(student, teacher, plan, batches, topology, method="outputs", shared=shared)

    refitted(together=True)
    ratios = []
    for _ in range(REPEATS):
        (_, before), (_, taken), (_, after) = (
            seconds(lambda together=together: refitted(together=together)) for together in (False, True, False)
        )
        ratios.append(2 * taken / (before + after))
    recipe = recipe_of("outputs", tokens // SEQUENCE)
    alone = sum(sum(refit_flops(recipe, SHAPE, shape)) for shape in shapes)
    together = sum(shared_flops(recipe, SHAPE, sites))
    together += sum(sum(refit_flops(recipe, SHAPE, shape, sites)) for shape in shapes)
    peak = live_peak(SharedMoments, teacher, batches, topology, sites)
    counted = shared_bytes(recipe, SHAPE, sites) - weight_bytes(teacher) + shared_host_bytes(recipe, SHAPE, sites, 1)
    return {
        "axes": axes,
        "candidates": CANDIDATES[axes],
        "tokens": tokens,
        "shared_over_alone": median(ratios),
        "spread": [min(ratios), max(ratios)],
        "flops_shared_over_alone": together / alone,
        "peak_bytes": peak,
        "peak_over_estimate": peak / counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A refit's time over scoring, and its memory over the estimate.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    torch.set_num_threads(1)
    topology = Topology.start()
    for tokens in parser.parse_args().tokens:
        for method in get_args(Method):
            record("refit_cost", threads=1, repeats=REPEATS, **measured(method, tokens, topology), aim=6)
        for axes in CANDIDATES:
            record("refit_search", threads=1, repeats=REPEATS, **searched(axes, tokens, topology))


if __name__ == "__main__":
    main()
