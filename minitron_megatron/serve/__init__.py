"""Serving of a Hugging Face folder: known gaps of inference engines, FP8, and throughput.

Knows: Hugging Face folders, modelopt, the benchmarks of TensorRT-LLM and vLLM. Must not know: training, recipes, run
folders.
"""

from .clients import client_notes, client_warnings
from .local import measure_locally
from .quantize import check_fp8, quantize_fp8
from .servers import SERVERS, Server
from .throughput import LADDER, Measured, Workload, write_requests

__all__ = [
    "LADDER",
    "SERVERS",
    "Measured",
    "Server",
    "Workload",
    "check_fp8",
    "client_notes",
    "client_warnings",
    "measure_locally",
    "quantize_fp8",
    "write_requests",
]
