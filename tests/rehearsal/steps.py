"""Distillation steps that are run both on a real CPU and on a rehearsed GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.layout import Shape
from minitron_megatron.model import Chunk, ModelConfig, Recompute, assign, build, named_shards
from minitron_megatron.parallel import Topology, one_kernel
from minitron_megatron.rehearsal import Ledger, rehearsed_rank
from minitron_megatron.testing import LivePeak
from minitron_megatron.train import Learner, Training

__all__ = [
    "TEACHER",
    "Facts",
    "batches",
    "compiled_kernel",
    "empty",
    "real",
    "rehearsed",
    "rehearsed_in_a_world",
    "repeated",
    "student_step",
]

TEACHER = Shape(layers=2, hidden=64, ffn=96, heads=4, kv_groups=2, head_dim=16, vocab=256)
STUDENT = TEACHER.resized(hidden=48, ffn=64)
SEQUENCE = 32

Facts = dict[str, Any]
"""Bytes before the step, peak bytes, FLOPs, and bytes by collective and size of its group."""


def empty(shape: Shape, topology: Topology, recompute: Recompute = "none") -> list[Chunk]:
    """Return a bf16 model on the topology's device; all its weights are 0.01."""
    model = build(ModelConfig(shape, max_positions=64), topology, torch.bfloat16, recompute=recompute)
    for chunk in model:
        chunk.config.bias_activation_fusion = False  # as on a CPU
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


def student_step(topology: Topology, recompute: Recompute = "none") -> Any:
    """Return a function that runs one step of distillation, after a first one that made the optimizer's states."""
    teacher, student = empty(TEACHER, topology), empty(STUDENT, topology, recompute)
    objective = KDObjective(teacher, topology, vocab=TEACHER.vocab)
    learner = Learner(student, Training(steps=4), topology)
    data = batches(topology)
    learner.step(data, objective)
    return lambda: learner.step(data, objective)


class _Meter(LivePeak):
    """Meter of real tensors, without states of random generators: those of the device lie on the host."""

    def _count(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) and tensor.dtype != torch.uint8:
            super()._count(tensor)


class _Total(_Meter):
    """Meter whose peak includes what a ledger counts on the device."""

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


class _Sent(TorchDispatchMode):
    """Counter of the bytes that a real rank gives to collectives of more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.split("::")[1].rstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        size = next(dist.ProcessGroup.unbox(each).size() for each in args if _is_group(each))
        if size > 1:
            tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
            key = f"{name} in {size}"
            self.bytes[key] = self.bytes.get(key, 0) + max((each.nbytes for each in tensors), default=0)


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def real(topology: Topology, recompute: Recompute = "none") -> Facts:
    """Run two steps on a rank of a real world, with torch's plain attention; return the facts of the second."""
    with sdpa_kernel(SDPBackend.MATH), _Meter() as meter:
        step = student_step(topology, recompute)
        meter.peak = meter.now
        before = meter.now - meter.start
        step()
        peak = meter.extra
        with FlopCounterMode(display=False) as flops, _Sent() as sent:  # a later step: their hooks keep tensors alive
            step()
        return {"before": before, "peak": peak, "flops": flops.get_total_flops(), "sent": sent.bytes}


def rehearsed(rank: int, world: int, layout: Mapping[str, Any], recompute: Recompute = "none") -> Facts:
    """Run the same as one rehearsed rank, whose allocator has blocks of one byte."""
    with rehearsed_rank(rank, world, ledger=Ledger(block=1), fused=False) as ledger:
        topology = Topology.start(**layout)
        with _Total(ledger) as meter:
            step = student_step(topology, recompute)
            meter.highest = before = meter.total
            section = ledger.begin()
            step()
        topology.stop()
    facts = {"before": before, "peak": meter.highest, "flops": sum(section.flops.values()), "sent": dict(section.sent)}
    return facts | {"device": section.peak}


def repeated() -> list[list[Any]]:
    """Run operations of one layout but other numbers, types and storages, twice each; return what tells them apart."""
    with rehearsed_rank(0, 1, ledger=Ledger(block=1)) as ledger:
        numbers, others = (torch.empty(4, 6, dtype=torch.int64, device="cuda") for _ in range(2))
        few, many = (torch.arange(4).lt(count).cuda() for count in (2, 3))
        before = ledger.now
        found = []
        for _ in range(2):
            section = ledger.begin()
            views = [numbers.t(), *numbers.split(2), numbers[1:]]
            owners = {view.untyped_storage()._cdata for view in views} == {numbers.untyped_storage()._cdata}
            offsets = [view.storage_offset() for view in views]
            numbers.copy_(numbers)
            kernels = section.kernels["copy_"]
            numbers.copy_(others)
            found.append([len(numbers[few]), len(numbers[many]), owners, offsets, ledger.now - before, kernels])
            found[-1] += [
                section.kernels["copy_"],
                (numbers * 2).dtype,
                (numbers * 2.0).dtype,
                numbers.add_(1) is numbers,
            ]
            found[-1] += [few.sum().item(), many.sum().item()]
    return found


def compiled_kernel() -> list[list[Any]]:
    """Run a compiled function twice; return its kernels, and the bytes touched, alive after it and at its peak."""

    @one_kernel
    def scaled(states: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        states.mul_(by).add_(1)
        return states, (states * 2).exp().sum(-1)

    found = []
    with rehearsed_rank(0, 1, ledger=Ledger(block=1)) as ledger:
        states, by = torch.ones(8, 16, device="cuda"), torch.ones(8, 1, device="cuda")
        before = ledger.now
        for _ in range(2):
            section = ledger.begin()
            results = scaled(states, by)
            assert results[0] is states
            touched = sum(section.touched.values())
            found.append([dict(section.kernels), touched, ledger.now - before, section.peak - before])
            del results
    return found


def rehearsed_in_a_world(topology: Topology) -> Facts:
    """Rehearse in a process that is a rank of a real world, which is refused."""
    return rehearsed(topology.rank, 1, {})
