"""Faults that a GPU would show and a CPU does not, planted in the product one by one."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.errors import MinitronError
from minitron_megatron.parallel import Topology
from minitron_megatron.rehearsal import rehearsed_rank
from tests.rehearsal.steps import student_step

__all__ = ["FAULTS", "planted"]

FAULTS = {
    "tokens stay on the CPU": "device",
    "a mask stays on the CPU": "stack of tensors on the CPU and on the GPU, at model/schedule.py",
    "a buffer without a device": "cuda:0 and cpu",
    "a CPU tensor to NCCL": "allreduce of a tensor on the CPU in a group of NCCL, at parallel/collectives.py",
    ".numpy() of a device tensor": ".numpy() of a tensor on the GPU, at train/learner.py",
    "float64 activations": "float64",
    "another device": "this rank's device is cuda:0",
    "int16 to NCCL": "which NCCL does not have",
    "a strided tensor to NCCL": "not contiguous",
    "fp32 times bf16": "float32",
}
"""Fault -> part of the error that finds it."""


def _module(name: str) -> Any:
    return sys.modules[f"minitron_megatron.{name}"]


def _plant(fault: str) -> tuple[Any, str, Any]:
    """Return (owner, attribute, value) that plants a fault."""
    norm, learner, fused, vocab = (
        *(_module("model.spec").Norm, _module("train.learner")),
        *(_module("losses.fused"), _module("losses.vocab")),
    )
    to, forward, states, reduce = Batch.to, norm.forward, fused._states, vocab.all_reduce
    kinds: dict[str, tuple[Any, str, Any]] = {
        "tokens stay on the CPU": (Batch, "to", lambda b, d: replace(to(b, d), tokens=b.tokens)),
        "a mask stays on the CPU": (Batch, "to", lambda b, d: replace(to(b, d), mask=b.mask)),
        "a buffer without a device": (norm, "forward", lambda n, x: forward(n, x) * torch.ones(x.shape[-1])),
        "a CPU tensor to NCCL": (vocab, "all_reduce", lambda x, g, *o: reduce(torch.ones(3), g, *o)),
        ".numpy() of a device tensor": (learner, "global_sums", lambda loss, *_: loss.numpy()),
        "float64 activations": (norm, "forward", lambda n, x: forward(n, x.repeat(4096, 1, 1).double()[:2])),
        "another device": (norm, "forward", lambda n, x: x + torch.zeros_like(x, device="cuda:1")),
        "int16 to NCCL": (vocab, "all_reduce", lambda x, g, *o: reduce(x.view(torch.int16), g, *o)),
        "a strided tensor to NCCL": (vocab, "all_reduce", lambda x, g, *o: reduce(_strided(x), g, *o)),
        "fp32 times bf16": (fused, "_states", lambda h, v: states(h, v).float()),
    }
    return kinds[fault]


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def planted(fault: str) -> str:
    """Return the error of a distillation step at tp 2 with a fault."""
    with rehearsed_rank(0, 2):
        topology = Topology.start(tp=2, sequence_parallel=True)
        try:
            owner, name, value = _plant(fault)
            before = getattr(owner, name)
            setattr(owner, name, value)
            try:
                student_step(topology)
            finally:
                setattr(owner, name, before)
        except MinitronError as error:
            return str(error)
        finally:
            topology.stop()
    return ""
