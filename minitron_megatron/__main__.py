"""`minitron` and `python -m minitron_megatron`, so that torchrun can start the command line."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C while its modules are still being imported ends it like any other."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from minitron_megatron.cli import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    print("Interrupted. Run the same command again to go on.", file=sys.stderr)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
