"""Workloads of a serving benchmark, and what is measured of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import whole_file

__all__ = ["LADDER", "Measured", "Workload", "write_requests"]

LADDER = ((128, 128), (128, 2048), (2048, 128), (2048, 2048), (1024, 1024), (8192, 1024), (32768, 1024))
"""(input, output) tokens per request, as in the papers and in TensorRT-LLM's own tables."""


@dataclass(frozen=True)
class Workload:
    """Requests of one size."""

    inputs: int
    """Tokens per prompt."""
    outputs: int
    """Tokens generated per request."""
    batch: int
    """Concurrent requests."""
    requests: int
    """Requests in total, where a server runs the benchmark."""

    @property
    def name(self) -> str:
        return f"{self.inputs}-{self.outputs}-b{self.batch}"


@dataclass(frozen=True)
class Measured:
    """Throughput of one model; None for a figure that the report lacks."""

    tokens_per_second: float | None
    """Generated tokens per second, over all requests."""
    requests_per_second: float | None
    latency_ms: float | None
    """Mean latency of a request."""
    first_token_ms: float | None
    """Mean time to the first token."""
    token_ms: float | None
    """Mean time between tokens after the first."""
    gpus: int | None


def write_requests(path: Path, workload: Workload, vocab: int, seed: int = 0) -> None:
    """Write one JSON line per request, with random tokens: `task_id`, `input_ids`, `output_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for number in range(workload.requests):
            tokens = torch.randint(0, vocab, (workload.inputs,), generator=generator).tolist()
            line = {"task_id": number, "input_ids": tokens, "output_tokens": workload.outputs}
            file.write(json.dumps(line) + "\n")
