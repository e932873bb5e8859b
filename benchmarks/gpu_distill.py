"""Speed of distillation on one GPU, with the fused KL and with a loss that materialises all logits.

    python benchmarks/gpu_distill.py            # Llama-3.1 8B -> 4B, width and depth: a GPU of 80 GB or more
    python benchmarks/gpu_distill.py --toy      # the same at toy size, on any machine; nothing is recorded

Random weights, bf16, flash attention through SDPA, full recomputation, one sequence of 8,192 tokens per micro-batch.
A step is the teacher's forward pass and the student's forward and backward. The optimizer is left out: its 12 bytes per
parameter, which a cluster shards over its ranks, would not fit on one GPU. Model FLOPs do not include recomputation.
The two losses alternate; medians of five.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.layout import Shape, flops_per_token, parameters
from minitron_megatron.model import ModelConfig, build, fill_initial, forward_backward, output_weight
from minitron_megatron.parallel import Topology, peak_flops
from minitron_megatron.testing import LivePeak

LLAMA = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256)
TOY = Shape(layers=4, hidden=64, ffn=96, heads=4, kv_groups=2, head_dim=16, vocab=1000)
STUDENTS = {
    "full": {"width": LLAMA.resized(hidden=3072, ffn=9216), "depth": LLAMA.resized(layers=16)},
    "toy": {"width": TOY.resized(hidden=48, ffn=64), "depth": TOY.resized(layers=2)},
}
MICRO_BATCHES = 2


class Unfused(KDObjective):
    """The same loss in plain torch, with all logits of a micro-batch at once."""

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        real = slice(self.vocab)
        with torch.no_grad():
            log_q = (self._hidden[index] @ output_weight(self.teacher[-1])[real].t()).float().log_softmax(-1)
        log_p = (hidden @ output_weight(chunk)[real].t()).float().log_softmax(-1)
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)


def model(shape: Shape, topology: Topology, dtype: torch.dtype, seed: int) -> list[Any]:
    made = build(ModelConfig(shape, max_positions=8192), topology, dtype, recompute="full")
    fill_initial(made, topology, seed)
    return made


def step(student: list[Any], objective: KDObjective, batches: Sequence[Batch], device: torch.device) -> float:
    """Return the seconds of one step."""
    for chunk in student:
        chunk.zero_grad(set_to_none=True)
    began = time.perf_counter()
    objective.prepare(batches)
    forward_backward(student, batches, objective.loss)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(student: list[Any], objective: KDObjective, batches: Sequence[Batch], device: torch.device) -> int:
    """Return the peak memory of a step in bytes, including weights."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(student, objective, batches, device)
        return torch.cuda.max_memory_allocated()
    with LivePeak() as meter:
        step(student, objective, batches, device)
    return meter.peak


def measure(
    name: str, teacher_shape: Shape, shape: Shape, sequence: int, repeats: int, topology: Topology
) -> dict[str, Any]:
    dtype, device = torch.bfloat16, topology.device
    teacher, student = model(teacher_shape, topology, dtype, 0), model(shape, topology, dtype, 1)
    draw = torch.randint(0, shape.vocab, (MICRO_BATCHES, 1, sequence + 1), generator=torch.Generator().manual_seed(0))
    every = torch.ones(1, sequence, dtype=torch.bool)
    batches = [Batch(each[:, :-1], each[:, 1:], every).to(device) for each in draw]
    objectives = {
        "fused": KDObjective(teacher, topology, vocab=shape.vocab),
        "unfused": Unfused(teacher, topology, vocab=shape.vocab),
    }
    peaks = {loss: peak(student, objective, batches, device) for loss, objective in objectives.items()}
    seconds: dict[str, list[float]] = {loss: [] for loss in objectives}
    for _ in range(repeats):
        for loss, objective in objectives.items():
            seconds[loss].append(step(student, objective, batches, device))
    tokens = MICRO_BATCHES * sequence
    own, taught = 3 * flops_per_token(shape, sequence), flops_per_token(teacher_shape, sequence)
    found: dict[str, Any] = {"student": name, "parameters": parameters(shape), "sequence": sequence}
    for loss, times in seconds.items():
        rate, top = tokens / median(times), peak_flops()
        found[loss] = {
            "tokens_per_second": rate,
            "student_tflops": rate * own / 1e12,
            "teacher_tflops": rate * taught / 1e12,
            "utilisation": rate * (own + taught) / top if top else None,
            "peak_bytes": peaks[loss],
        }
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--toy", action="store_true", help="toy shapes on any machine; results are only printed")
    toy = options.parse_args().toy
    if not toy and not torch.cuda.is_available():
        raise SystemExit("No GPU is here. Try --toy.")
    topology = Topology.start()
    teacher, sequence, repeats = (TOY, 64, 1) if toy else (LLAMA, 8192, 5)
    for name, shape in STUDENTS["toy" if toy else "full"].items():
        found = measure(name, teacher, shape, sequence, repeats, topology)
        if toy:
            print(found)
        else:
            record("gpu_distill", gpu=torch.cuda.get_device_name(), **found)


if __name__ == "__main__":
    main()
