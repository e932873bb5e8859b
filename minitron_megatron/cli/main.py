"""Exit codes: 0 done, 2 the user's input is wrong, 1 our fault, 75 preempted after saving, 130 interrupted."""

from __future__ import annotations

import os
import sys
import warnings

__all__ = ["main"]

WRONG_INPUT, PREEMPTED, INTERRUPTED = 2, 75, 130


def main() -> None:
    """Runs the command line and ends the process. An error of the user's is one message, on the first rank only."""
    _quiet()
    from ..errors import MinitronError, Preempted
    from .app import Interrupted, app

    try:
        app()
    except MinitronError as error:
        _say(f"{type(error).__name__}: {error}")
        _leave(WRONG_INPUT)
    except Preempted:
        _say("Saved, as the scheduler's signal asked. Run the same command again to go on.")
        _leave(PREEMPTED)
    except Interrupted:
        _say("Interrupted. Run the same command again to go on.")
        _leave(INTERRUPTED)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _leave(code: int) -> None:
    """Ends at once: other ranks may be gone, and a clean shutdown would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _quiet() -> None:
    """Keeps what megatron-core says at import, of packages that are optional here, from a user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|flash|modelopt|not a leaf Tensor|DTensor).*")
