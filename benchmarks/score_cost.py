"""Cost of scoring all width axes, compared with a plain forward pass over the same batch.

    python benchmarks/score_cost.py

Shape: hidden 512, 8 layers, sequence 512; both passes stop at the final hidden states. Bound: 1.05 with the default
statistic. Each repeat runs plain, scored, plain over the same batches and divides by the mean of the two plain times;
one thread; median over repeats, for each of the nine statistics. CPU time is recorded too, since other load on the
machine distorts wall time.
"""

from __future__ import annotations

from itertools import product
from statistics import median

import torch
from clock import seconds
from record import record

from minitron_megatron.data import Batch
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial, forward_only
from minitron_megatron.parallel import Topology
from minitron_megatron.records import Statistic
from minitron_megatron.score import score

SHAPE = Shape(layers=8, hidden=512, ffn=1408, heads=8, kv_groups=2, head_dim=64, vocab=1000)
SEQUENCE, BATCHES, REPEATS = 512, 6, 5


def main() -> None:
    torch.set_num_threads(1)
    topology = Topology.start()
    model = build(ModelConfig(SHAPE), topology)
    fill_initial(model, topology, seed=0)
    model[0].eval()
    drawn = torch.randint(SHAPE.vocab, (BATCHES, 1, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    batches = [Batch(t[:, :-1], t[:, 1:], torch.ones(1, SEQUENCE, dtype=torch.bool)) for t in drawn]

    def plain() -> None:
        forward_only(model, batches)

    def ratios(statistic: Statistic) -> tuple[float, float]:
        def scored() -> None:
            score(model, batches, topology=topology, statistic=statistic)

        before, taken, after = seconds(plain), seconds(scored), seconds(plain)
        wall, cpu = (2 * t / (a + b) for a, t, b in zip(before, taken, after, strict=True))
        return wall, cpu

    found: dict[str, dict[str, float]] = {}
    for _ in range(3):
        plain()
    statistics = [Statistic(batch=b, sequence=s) for b, s in product(("l2", "mean", "var"), repeat=2)]
    measured: dict[Statistic, list[tuple[float, float]]] = {statistic: [] for statistic in statistics}
    for _ in range(REPEATS):
        for statistic in statistics:
            measured[statistic].append(ratios(statistic))
    for statistic, pairs in measured.items():
        wall, cpu = zip(*pairs, strict=True)
        found[f"{statistic.batch}, {statistic.sequence}"] = {"wall": median(wall), "cpu": median(cpu)}
    record(
        "score_cost",
        shape="hidden 512, ffn 1408, 8 layers, sequence 512, fp32",
        batches=BATCHES,
        repeats=REPEATS,
        over_forward=found,
        default=found["l2, mean"],
        bound=1.05,
    )


if __name__ == "__main__":
    main()
