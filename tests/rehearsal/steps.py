"""Distillation steps that are run both on a real CPU and on a rehearsed GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.layout import Shape
from minitron_megatron.model import Chunk, ModelConfig, assign, build, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.rehearsal import Ledger, rehearsed_rank
from minitron_megatron.testing import LivePeak
from minitron_megatron.train import Learner, Training

__all__ = ["TEACHER", "Facts", "batches", "empty", "on_cpu", "rehearsed", "student_step"]

TEACHER = Shape(layers=2, hidden=64, ffn=96, heads=4, kv_groups=2, head_dim=16, vocab=256)
STUDENT = TEACHER.resized(hidden=48, ffn=64)
SEQUENCE = 32

Facts = dict[str, Any]
"""Bytes before the step, peak bytes and FLOPs."""


def empty(shape: Shape, topology: Topology) -> list[Chunk]:
    """Return a bf16 model on the topology's device; all its weights are 0.01."""
    model = build(ModelConfig(shape, max_positions=64), topology, torch.bfloat16)
    for shard in named_shards(model):
        assign(shard, torch.full(shard.tensor.shape, 0.01, dtype=torch.bfloat16, device=topology.device))
    return model


def batches(topology: Topology, count: int = 2) -> list[Batch]:
    """Return micro-batches of two samples, each tensor with a storage of its own."""
    made = []
    for _ in range(count):
        tokens, labels = (torch.randint(0, TEACHER.vocab, (2, SEQUENCE)) for _ in range(2))
        made.append(Batch(tokens, labels, torch.ones(2, SEQUENCE, dtype=torch.bool)).to(topology.device))
    return made


def student_step(topology: Topology) -> Any:
    """Return a function that runs one step of distillation, after a first one that made the optimizer's states."""
    teacher, student = empty(TEACHER, topology), empty(STUDENT, topology)
    objective = KDObjective(teacher, topology, vocab=TEACHER.vocab)
    learner = Learner(student, Training(steps=4), topology)
    data = batches(topology)
    learner.step(data, objective)
    return lambda: learner.step(data, objective)


class _Total(LivePeak):
    """Meter of real tensors, whose peak includes what a ledger counts on the device."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger, self.highest = ledger, 0

    @property
    def total(self) -> int:
        return self.ledger.now + self.now - self.start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.highest = max(self.highest, self.total)
        return out

    def _count(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor):
            super()._count(tensor)


def on_cpu() -> Facts:
    """Run two steps on this CPU, with torch's plain attention; return the facts of the second."""
    topology = Topology.start()
    with sdpa_kernel(SDPBackend.MATH), LivePeak() as meter:
        step = student_step(topology)
        meter.peak = meter.now
        before = meter.now - meter.start
        with FlopCounterMode(display=False) as flops:
            step()
        return {"before": before, "peak": meter.extra, "flops": flops.get_total_flops()}


def rehearsed(rank: int, world: int, **layout: Any) -> Facts:
    """Run the same as one rehearsed rank, whose allocator has blocks of one byte."""
    with rehearsed_rank(rank, world, ledger=Ledger(block=1), fused=False) as ledger:
        topology = Topology.start(**layout)
        with _Total(ledger) as meter:
            step = student_step(topology)
            meter.highest = before = meter.total
            section = ledger.begin()
            step()
        topology.stop()
    flops = sum(section.flops.values())
    return {"before": before, "peak": meter.highest, "device": section.peak, "flops": flops}
