"""`vllm bench throughput`: its command line and its report."""

from __future__ import annotations

from pathlib import Path

from .reports import number, read_report
from .throughput import Measured, Workload

__all__ = ["TOOL", "command", "parse_report"]

TOOL = "vllm"
FIGURE = "requests_per_second"


def command(model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
    """Return the command as an argument list; no shell is involved. vLLM draws random prompts of its own."""
    sizes = {
        "--random-input-len": workload.inputs,
        "--random-output-len": workload.outputs,
        "--num-prompts": workload.requests,
        "--max-num-seqs": workload.batch,
        "--max-model-len": workload.inputs + workload.outputs,
        "--tensor-parallel-size": tp,
    }
    return [
        *(TOOL, "bench", "throughput", "--model", str(model), "--dataset-name", "random"),
        *(text for name, value in sizes.items() for text in (name, str(value))),
        *("--no-enable-prefix-caching", "--output-json", str(report)),
    ]


def parse_report(path: Path, workload: Workload) -> Measured:
    """Read an `--output-json` file. Raises DataError if it is not a report.

    vLLM's own `tokens_per_second` counts prompts too: generated tokens come from the requests. It gives no latencies.
    """
    requests = number(read_report(path, "vllm bench throughput", FIGURE, (int, float)), FIGURE)
    return Measured(
        tokens_per_second=None if requests is None else requests * workload.outputs,
        requests_per_second=requests,
        latency_ms=None,
        first_token_ms=None,
        token_ms=None,
        gpus=None,
    )
