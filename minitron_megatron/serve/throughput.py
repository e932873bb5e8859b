"""trtllm-bench: its input data, its command line and its report."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import DataError
from ..files import whole_file

__all__ = ["LADDER", "Measured", "Workload", "command", "has_trtllm", "parse_report", "write_requests"]

LADDER = ((128, 128), (128, 2048), (2048, 128), (2048, 2048), (1024, 1024), (8192, 1024), (32768, 1024))
"""(input, output) tokens per request, as in the papers and in TensorRT-LLM's own tables."""
TOOL = "trtllm-bench"


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
    """Requests in total, for trtllm-bench."""

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


def has_trtllm() -> bool:
    return shutil.which(TOOL) is not None


def write_requests(path: Path, workload: Workload, vocab: int, seed: int = 0) -> None:
    """Write one JSON line per request, with random tokens: `task_id`, `input_ids`, `output_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for number in range(workload.requests):
            tokens = torch.randint(0, vocab, (workload.inputs,), generator=generator).tolist()
            line = {"task_id": number, "input_ids": tokens, "output_tokens": workload.outputs}
            file.write(json.dumps(line) + "\n")


def command(name: str, model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
    """Return the command as an argument list; no shell is involved."""
    measure = f"--tp {tp} --concurrency {workload.batch} --max_batch_size {workload.batch} --warmup 2 --streaming"
    return [
        *(TOOL, "--model", name, "--model_path", str(model), "throughput", "--dataset", str(requests)),
        *("--backend", "pytorch", *shlex.split(measure), "--kv_cache_free_gpu_mem_fraction", "0.95"),
        *("--report_json", str(report)),
    ]


def parse_report(path: Path) -> Measured:
    """Read a `--report_json` file of any version; missing figures are None. Raises DataError if it is not a report."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a report of {TOOL}: {error}. Remove it and run the benchmark again.") from error
    performance = _block(raw, "performance")
    streaming, world = _block(raw, "streaming_metrics"), _block(raw, "world_info")
    if not performance:
        raise DataError(
            f"{path} is not a report of {TOOL}: it has no block `performance`. Remove it and run the benchmark again."
        )
    gpus = _number(world, "world_size") or (_number(world, "tp_size") or 1) * (_number(world, "pp_size") or 1)
    return Measured(
        tokens_per_second=_number(performance, "system_output_throughput_tok_s", "output_throughput_tok_s"),
        requests_per_second=_number(performance, "request_throughput_req_s"),
        latency_ms=_number(performance, "avg_request_latency_ms"),
        first_token_ms=_number(streaming, "avg_ttft_ms"),
        token_ms=_number(streaming, "avg_tpot_ms"),
        gpus=int(gpus) if world else None,
    )


def _block(raw: object, name: str) -> Mapping[str, object]:
    found = raw.get(name) if isinstance(raw, dict) else None
    return found if isinstance(found, dict) else {}


def _number(block: Mapping[str, object], *names: str) -> float | None:
    values = [block[name] for name in names if name in block]
    return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)
