"""Servers whose own benchmark measures an export: the command line of it, and its JSON report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import DataError
from .throughput import Measured, Workload

__all__ = ["SERVERS", "Server"]

TRTLLM, VLLM = "trtllm-bench", "vllm"
FIGURE = "requests_per_second"


class _Command(Protocol):
    def __call__(self, model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]: ...


@dataclass(frozen=True)
class Server:
    """How a server measures a workload."""

    tool: str
    """Its command, found in PATH."""
    name: str
    """How people call it."""
    command: _Command
    parse_report: Callable[[Path, Workload], Measured]


def _trtllm_command(model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
    """Return the command as an argument list; no shell is involved."""
    measure = f"--tp {tp} --concurrency {workload.batch} --max_batch_size {workload.batch} --warmup 2 --streaming"
    return [
        *(
            TRTLLM,
            "--model",
            model.resolve().name,
            "--model_path",
            str(model),
            "throughput",
            "--dataset",
            str(requests),
        ),
        *("--backend", "pytorch", *shlex.split(measure), "--kv_cache_free_gpu_mem_fraction", "0.95"),
        *("--report_json", str(report)),
    ]


def _trtllm_report(path: Path, workload: Workload) -> Measured:
    """Read a `--report_json` file of any version; missing figures are None. Raises DataError if it is not a report."""
    raw = _report(path, TRTLLM, "performance", dict)
    performance, streaming, world = (_block(raw, name) for name in ("performance", "streaming_metrics", "world_info"))
    gpus = _number(world, "world_size") or (_number(world, "tp_size") or 1) * (_number(world, "pp_size") or 1)
    return Measured(
        tokens_per_second=_number(performance, "system_output_throughput_tok_s", "output_throughput_tok_s"),
        requests_per_second=_number(performance, "request_throughput_req_s"),
        latency_ms=_number(performance, "avg_request_latency_ms"),
        first_token_ms=_number(streaming, "avg_ttft_ms"),
        token_ms=_number(streaming, "avg_tpot_ms"),
        gpus=int(gpus) if world else None,
    )


def _vllm_command(model: Path, requests: Path, report: Path, workload: Workload, *, tp: int = 1) -> list[str]:
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
        *(VLLM, "bench", "throughput", "--model", str(model), "--dataset-name", "random"),
        *(text for name, value in sizes.items() for text in (name, str(value))),
        *("--no-enable-prefix-caching", "--output-json", str(report)),
    ]


def _vllm_report(path: Path, workload: Workload) -> Measured:
    """Read an `--output-json` file. Raises DataError if it is not a report.

    vLLM's own `tokens_per_second` counts prompts too: generated tokens come from the requests. It gives no latencies.
    """
    requests = _number(_report(path, "vllm bench throughput", FIGURE, (int, float)), FIGURE)
    return Measured(
        tokens_per_second=None if requests is None else requests * workload.outputs,
        requests_per_second=requests,
        latency_ms=None,
        first_token_ms=None,
        token_ms=None,
        gpus=None,
    )


def _report(path: Path, tool: str, needs: str, kind: type | tuple[type, ...]) -> Mapping[str, object]:
    """Return a report. Raises DataError if it is not one: an object with the field `needs`, which is of a kind."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a report of {tool}: {error}. Remove it and run the benchmark again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get(needs), kind) or not raw[needs]:
        raise DataError(
            f"{path} is not a report of {tool}: it has no `{needs}`. Remove it and run the benchmark again."
        )
    return raw


def _block(raw: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return an object inside a report; empty if there is none."""
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def _number(block: Mapping[str, object], *names: str) -> float | None:
    """Return the first of some fields that is there; None if that is not a number."""
    values = [block[name] for name in names if name in block]
    return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)


SERVERS = {
    "trtllm": Server(TRTLLM, "TensorRT-LLM", _trtllm_command, _trtllm_report),
    "vllm": Server(VLLM, "vLLM", _vllm_command, _vllm_report),
}
"""Servers by their short name."""
