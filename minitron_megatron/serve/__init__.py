"""Serving of a Hugging Face folder: known gaps of inference engines, FP8, and throughput.

Knows: Hugging Face folders, modelopt, trtllm-bench. Must not know: training, recipes, run folders.
"""

from .clients import client_notes, client_warnings
from .local import measure_locally
from .quantize import check_fp8, quantize_fp8
from .throughput import LADDER, Measured, Workload, command, has_trtllm, parse_report, write_requests

__all__ = [
    "LADDER",
    "Measured",
    "Workload",
    "check_fp8",
    "client_notes",
    "client_warnings",
    "command",
    "has_trtllm",
    "measure_locally",
    "parse_report",
    "quantize_fp8",
    "write_requests",
]
