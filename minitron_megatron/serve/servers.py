"""Servers whose own benchmark measures an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import trtllm, vllm
from .throughput import Measured, Workload

__all__ = ["SERVERS", "Server"]


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


SERVERS = {
    "trtllm": Server(trtllm.TOOL, "TensorRT-LLM", trtllm.command, trtllm.parse_report),
    "vllm": Server(vllm.TOOL, "vLLM", vllm.command, vllm.parse_report),
}
"""Servers by their short name."""
