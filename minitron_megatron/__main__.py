"""Entry point of `minitron` and of `python -m minitron_megatron`, which torchrun starts."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

PREEMPTED, INTERRUPTED = 75, 130

DEVICE_SETTINGS = {
    # kernels start in the order of their launch, so that tensor-parallel communication starts before the matrix
    # multiplication that it overlaps with (as in Megatron-LM's scripts)
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # less fragmentation, since teacher and student alternate
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # tensors of collectives are freed earlier: NCCL keeps references instead of recording streams
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}
"""Variables that CUDA, torch and NCCL read when they start. What the environment has goes before."""


def main() -> None:
    """Run the command line. A signal during its imports gives the same exit code as a later one."""
    for name, value in DEVICE_SETTINGS.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)
    from .cli import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    interrupted = number == signal.SIGINT
    if os.environ.get("RANK", "0") == "0":
        reason = "Interrupted." if interrupted else "Stopped by the scheduler's signal before work began."
        print(f"{reason} Run the same command again to resume.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED if interrupted else PREEMPTED)


if __name__ == "__main__":
    main()
