"""Exit codes: 0 done, 2 the user's input is wrong, 1 our fault, 75 preempted after saving, 130 interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from types import FrameType

from rich.console import Console

from .gc_tuning import relax_gc
from .interrupt import Interrupted, ignore, interrupted, listen
from .output import keep_writing

__all__ = ["main"]

OUR_FAULT, WRONG_INPUT, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
LEAVE_SECONDS = 10.0
"""How long a failed rank may take to find out whether another has told of it, and an interrupted one to clean up."""


def main() -> None:
    """Runs the command line and ends the process: at once, where it failed, whatever the other ranks wait for.

    An error of the user's is one message, of the rank that met it first.
    """
    keep_writing()
    _quiet()
    relax_gc()
    from ..errors import MinitronError, Preempted
    from ..files import told_by

    try:
        listen(LEAVE_SECONDS, _interrupted)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a stage at work hears them itself
            signal.signal(number, _preempted)
        from .app import app

        app()
    except (Interrupted, KeyboardInterrupt):
        _interrupted()
    except SystemExit:
        if interrupted():  # typer met the KeyboardInterrupt, while it read the command line
            _interrupted()
        raise
    except MinitronError as error:
        _fail(WRONG_INPUT, error, f"{type(error).__name__}: {error}")
    except Preempted:
        _say("Saved, as the scheduler's signal asked. Run the same command again to go on.")
        _leave(PREEMPTED)
    except Exception as error:
        if interrupted():  # what a library made of the KeyboardInterrupt
            _interrupted()
        if isinstance(error, OSError) and (told := told_by(error)):
            _fail(WRONG_INPUT, error, told)
        _fail(OUR_FAULT, error, traceback.format_exc().strip())
    finally:
        ignore()


def _preempted(number: int, frame: FrameType | None) -> None:
    from ..errors import Preempted

    raise Preempted


def _interrupted() -> None:
    Console().show_cursor()  # a bar may have hidden it
    _say("Interrupted. Run the same command again to go on.")
    _leave(INTERRUPTED)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _fail(code: int, error: Exception, told: str) -> None:
    """Ends with `code`. The first rank that fails tells all; the others fail of that, as a rule, and need a line."""
    last = threading.Timer(LEAVE_SECONDS, os._exit, [code])
    last.daemon = True
    last.start()
    if _speaks(code):
        print(told, file=sys.stderr)
    elif code == OUR_FAULT:
        line = str(error).partition("\n")[0]
        print(f"rank {os.environ.get('RANK')} ends after another: {type(error).__name__}: {line}", file=sys.stderr)
    _leave(code)


def _speaks(code: int) -> bool:
    """Whether this rank tells why it ends. Those that are not joined yet all read the same recipe."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from ..parallel import first_to_fail

    first = first_to_fail()
    return (code == OUR_FAULT or os.environ.get("RANK", "0") == "0") if first is None else first


def _leave(code: int) -> None:
    """Ends at once: other ranks may be gone, and a clean shutdown would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _quiet() -> None:
    """Keeps what torch and megatron-core say, of packages that are optional here, from a user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of sockets: who lost whom is told once
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|flash|modelopt|not a leaf Tensor|DTensor).*")
