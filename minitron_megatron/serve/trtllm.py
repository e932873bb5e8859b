"""trtllm-bench: its command line and its report."""

from __future__ import annotations

import shlex
from pathlib import Path

from .reports import block, number, read_report
from .throughput import Measured, Workload

__all__ = ["TOOL", "command", "parse_report"]

TOOL = "trtllm-bench"


def command(model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
    """Return the command as an argument list; no shell is involved."""
    measure = f"--tp {tp} --concurrency {workload.batch} --max_batch_size {workload.batch} --warmup 2 --streaming"
    return [
        *(TOOL, "--model", model.resolve().name, "--model_path", str(model), "throughput", "--dataset", str(requests)),
        *("--backend", "pytorch", *shlex.split(measure), "--kv_cache_free_gpu_mem_fraction", "0.95"),
        *("--report_json", str(report)),
    ]


def parse_report(path: Path, workload: Workload) -> Measured:
    """Read a `--report_json` file of any version; missing figures are None. Raises DataError if it is not a report."""
    raw = read_report(path, TOOL, "performance", dict)
    performance, streaming, world = (block(raw, name) for name in ("performance", "streaming_metrics", "world_info"))
    gpus = number(world, "world_size") or (number(world, "tp_size") or 1) * (number(world, "pp_size") or 1)
    return Measured(
        tokens_per_second=number(performance, "system_output_throughput_tok_s", "output_throughput_tok_s"),
        requests_per_second=number(performance, "request_throughput_req_s"),
        latency_ms=number(performance, "avg_request_latency_ms"),
        first_token_ms=number(streaming, "avg_ttft_ms"),
        token_ms=number(streaming, "avg_tpot_ms"),
        gpus=int(gpus) if world else None,
    )
