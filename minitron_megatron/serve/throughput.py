"""trtllm-bench: the data that it reads, its command, and what it reports."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..files import whole_file

__all__ = ["LADDER", "Measured", "Workload", "command", "has_trtllm", "parse_report", "write_requests"]

LADDER = ((128, 128), (128, 2048), (2048, 128), (2048, 2048), (1024, 1024), (8192, 1024), (32768, 1024))
"""(input, output) tokens of a request, as in the papers and in TensorRT-LLM's own tables."""
TOOL = "trtllm-bench"


@dataclass(frozen=True)
class Workload:
    """Requests of one size, so many at a time."""

    inputs: int
    """Tokens of each prompt."""
    outputs: int
    """Tokens made for each."""
    batch: int
    """Requests at a time."""
    requests: int

    @property
    def name(self) -> str:
        return f"{self.inputs}-{self.outputs}-b{self.batch}"


@dataclass(frozen=True)
class Measured:
    """What a report says; None for what it does not."""

    tokens_per_second: float | None
    """Made, of all requests together."""
    requests_per_second: float | None
    latency_ms: float | None
    """Mean of a request."""
    first_token_ms: float | None
    token_ms: float | None
    """Mean between tokens after the first."""
    gpus: int | None


def has_trtllm() -> bool:
    return shutil.which(TOOL) is not None


def write_requests(path: Path, workload: Workload, vocab: int, seed: int = 0) -> None:
    """A JSON line a request, of random tokens: `task_id`, `input_ids`, `output_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for number in range(workload.requests):
            tokens = torch.randint(0, vocab, (workload.inputs,), generator=generator).tolist()
            line = {"task_id": number, "input_ids": tokens, "output_tokens": workload.outputs}
            file.write(json.dumps(line) + "\n")


def command(name: str, model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
    """The arguments of a run; no shell reads them."""
    measure = f"--tp {tp} --concurrency {workload.batch} --max_batch_size {workload.batch} --warmup 2 --streaming"
    return [
        *(TOOL, "--model", name, "--model_path", str(model), "throughput", "--dataset", str(requests)),
        *("--backend", "pytorch", *shlex.split(measure), "--kv_cache_free_gpu_mem_fraction", "0.95"),
        *("--report_json", str(report)),
    ]


def parse_report(path: Path) -> Measured:
    """A `--report_json` file of any version: what is missing is None. Raises DataError where it is no report at all."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no report of {TOOL}: {error}. Run it again.") from error
    performance = _block(raw, "performance")
    streaming, world = _block(raw, "streaming_metrics"), _block(raw, "world_info")
    if not performance:
        raise DataError(f"{path} is no report of {TOOL}: it has no block `performance`. Run it again.")
    gpus = _number(world, "world_size") or (_number(world, "tp_size") or 1) * (_number(world, "pp_size") or 1)
    return Measured(
        tokens_per_second=_number(performance, "system_output_throughput_tok_s", "output_throughput_tok_s"),
        requests_per_second=_number(performance, "request_throughput_req_s"),
        latency_ms=_number(performance, "avg_request_latency_ms"),
        first_token_ms=_number(streaming, "avg_ttft_ms"),
        token_ms=_number(streaming, "avg_tpot_ms"),
        gpus=int(gpus) if world else None,
    )


def _block(raw: Any, name: str) -> Mapping[str, Any]:
    found = raw.get(name) if isinstance(raw, dict) else None
    return found if isinstance(found, dict) else {}


def _number(block: Mapping[str, Any], *names: str) -> float | None:
    values: Sequence[Any] = [block[name] for name in names if name in block]
    return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)
