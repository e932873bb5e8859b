"""Entry point of `minitron` and of `python -m minitron_megatron`, which torchrun starts."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

PREEMPTED, INTERRUPTED = 75, 130


def main() -> None:
    """Run the command line. A signal during its imports gives the same exit code as a later one."""
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
