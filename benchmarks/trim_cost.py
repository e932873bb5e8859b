"""Time to prune a model of a billion parameters, compared with copying the kept bytes once.

    python benchmarks/trim_cost.py [--layers 16]

A random bf16 model is pruned to 3/4 of its hidden channels, neurons, query heads and layers by a random plan.
The floor: copy every tensor of the pruned model once, from memory of the same size. Aim: a ratio of 3 or less. Measured
in pairs, with the floor before and after; median of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from math import prod
from statistics import median

import torch
from record import record

from minitron_megatron.layout import Shape, lookup, parameters
from minitron_megatron.model import ModelConfig, assign, build, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="trim over the time to copy the kept bytes.")
    parser.add_argument("--layers", type=int, default=16)
    layers = parser.parse_args().layers
    shape = Shape(layers, hidden=2048, ffn=8192, heads=32, kv_groups=8, head_dim=64, vocab=32768, tied=True)
    kept = range(layers * 3 // 4)
    plan = random_plan(shape, 1, layers=tuple(kept), hidden=1536, ffn=6144, heads=24)
    topology = Topology.start()
    pattern = torch.randn(1 << 20).bfloat16()
    targets = [prod(lookup(name).shape(plan.target.sizes())) for name in plan.target.names()]
    source = torch.empty(max(targets), dtype=torch.bfloat16).fill_(1)

    def filled() -> list[object]:
        model = build(ModelConfig(shape), topology, torch.bfloat16)
        for shard in named_shards(model):
            size = shard.tensor.numel()
            assign(shard, pattern.repeat(-(-size // len(pattern)))[:size].view(shard.tensor.shape).clone())
        return model

    def copied() -> None:
        _ = [torch.empty(size, dtype=torch.bfloat16).copy_(source[:size]) for size in targets]

    ratios = []
    for _ in range(REPEATS):
        model = filled()
        before, taken = seconds(copied), seconds(lambda model=model: trim(model, plan, topology))
        ratios.append(2 * taken / (before + seconds(copied)))
    record(
        "trim_cost",
        parameters=parameters(shape),
        kept_bytes=2 * sum(targets),
        repeats=REPEATS,
        threads=torch.get_num_threads(),
        over_copy=median(ratios),
        spread=[min(ratios), max(ratios)],
        aim=3,
    )


if __name__ == "__main__":
    main()
