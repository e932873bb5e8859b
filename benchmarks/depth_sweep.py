"""Cost of a depth sweep, compared with the layers after its blocks.

    python benchmarks/depth_sweep.py

The floor: one pass of the full network; for each network without a block, the layers after the block, each at its share
of a full pass's time, and an output layer. Bound: the sweep's wall time is at most 1.1 of the floor. Measured in pairs,
one micro-batch at a time, half of the floor before and half after the sweep; one thread; median of 5. The same ratio in
CPU time is recorded too, since other load on the machine distorts wall times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
from record import record
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.layout import Shape
from minitron_megatron.losses import Output, Vocabulary, lm_loss
from minitron_megatron.model import ModelConfig, build, fill_initial, forward_only, output_weight
from minitron_megatron.parallel import Topology
from minitron_megatron.score import leave_out

SHAPE = Shape(layers=8, hidden=256, ffn=768, heads=4, kv_groups=2, head_dim=64, vocab=8000)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 256, 1, 8
LENGTHS = (1, 2, 4)
REPEATS, PASSES = 5, 8
"""Passes over a micro-batch that measure its floor: half before its sweep, half after."""


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    size = (MICRO_BATCH, SEQUENCE + 1)
    drawn = [torch.randint(SHAPE.vocab, size, generator=generator) for _ in range(MICRO_BATCHES)]
    return [Batch(t[:, :-1], t[:, 1:], torch.ones(MICRO_BATCH, SEQUENCE, dtype=torch.bool)) for t in drawn]


def seconds(work: Callable[[], object]) -> Tensor:
    """Return seconds as [wall, CPU]."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)


def main() -> None:
    torch.set_num_threads(1)
    topology, every = Topology.start(), batches()
    model = build(ModelConfig(SHAPE), topology)
    fill_initial(model, topology, seed=0)
    model[0].eval()
    weight = output_weight(model[0]).detach()
    blocks = [(first, n) for n in LENGTHS for first in range(SHAPE.layers - n + 1)]
    passes = 1 + sum(SHAPE.layers - first - n for first, n in blocks) / SHAPE.layers

    def paired(batch: Batch) -> Tensor:
        """Return [sweep, floor] x [wall, CPU], in seconds."""
        (hidden,) = forward_only(model, [batch])

        def whole() -> None:
            for _ in range(PASSES // 2):
                forward_only(model, [batch])

        def output() -> None:
            for _ in range(PASSES // 2):
                lm_loss(Output(hidden, weight), batch.labels, batch.mask, Vocabulary(SHAPE.vocab, topology.tp_group))

        layers, outputs = seconds(whole), seconds(output)
        swept = seconds(lambda: leave_out(model, [batch], topology=topology, lengths=LENGTHS))
        layers, outputs = layers + seconds(whole), outputs + seconds(output)
        return torch.stack([swept, (layers * passes + outputs * (1 + len(blocks))) / PASSES])

    paired(every[0])  # warm-up
    times = [torch.stack([paired(batch) for batch in every]).sum(0) for _ in range(REPEATS)]
    taken, floor = torch.stack(times, dim=1)
    wall, cpu = (taken / floor).T.tolist()
    record(
        "depth_sweep",
        layers=SHAPE.layers,
        hidden=SHAPE.hidden,
        vocab=SHAPE.vocab,
        sequence=SEQUENCE,
        micro_batch=MICRO_BATCH,
        micro_batches=MICRO_BATCHES,
        lengths=LENGTHS,
        networks=1 + len(blocks),
        whole_passes=passes,
        floor_seconds=median(floor[:, 0].tolist()),
        sweep_seconds=median(taken[:, 0].tolist()),
        wall_over_floor=median(wall),
        wall_over_floor_all=wall,
        cpu_over_floor=median(cpu),
        load=os.getloadavg()[0],
    )


if __name__ == "__main__":
    main()
