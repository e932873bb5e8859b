"""Entry point and exit codes: 0 done, 2 wrong input, 1 internal error, 75 preempted after saving, 130 interrupted."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import warnings

from rich.console import Console

from .gc_tuning import relax_gc
from .interrupt import Interrupted, ignore, interrupted, listen, listen_to_scheduler, preempted
from .output import keep_writing, wrapped

__all__ = ["main"]

OUR_FAULT, WRONG_INPUT, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
LEAVE_SECONDS = 10.0
"""Time for a failed rank to find out whether another has reported the failure, and for an interrupted one to clean
up."""


def main() -> None:
    """Run the command line and end the process; after a failure at once, even if other ranks wait.

    A user error is printed once, by the rank that met it first.
    """
    keep_writing()
    _quiet()
    relax_gc()
    from ..errors import MinitronError, Preempted
    from ..files import told_by

    try:
        listen(LEAVE_SECONDS, _interrupted)
        listen_to_scheduler()
        from .app import app

        app()
    except (Interrupted, KeyboardInterrupt):
        _interrupted()
    except SystemExit:
        if interrupted():  # typer caught the KeyboardInterrupt while it parsed the command line
            _interrupted()
        raise
    except Preempted:
        _leave_preempted()
    except Exception as error:
        if interrupted():  # a library turned the exception of the signal into another, or failed without it
            _interrupted()
        if preempted():
            _leave_preempted()
        if isinstance(error, MinitronError):
            _fail(WRONG_INPUT, error, wrapped(f"error: {error}", sys.stderr))
        if isinstance(error, OSError) and (message := told_by(error)):
            _fail(WRONG_INPUT, error, wrapped(f"error: {message}", sys.stderr))
        _fail(OUR_FAULT, error, traceback.format_exc().strip())
    finally:
        ignore()


def _leave_preempted() -> None:
    _print_on_first_rank("Stopped by the scheduler's signal. Run the same command again to resume.")
    _leave(PREEMPTED)


def _interrupted() -> None:
    Console().show_cursor()  # a progress bar may have hidden it
    _print_on_first_rank("Interrupted. Run the same command again to resume.")
    _leave(INTERRUPTED)


def _print_on_first_rank(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _fail(code: int, error: Exception, message: str) -> None:
    """Exit with `code`. The first rank that fails prints the message; the others usually fail as a consequence, and
    print one line."""
    last = threading.Timer(LEAVE_SECONDS, os._exit, [code])
    last.daemon = True
    last.start()
    if _prints_error(code):
        print(message, file=sys.stderr)
    elif code == OUR_FAULT:
        line = str(error).partition("\n")[0]
        print(f"rank {os.environ.get('RANK')} ends after another: {type(error).__name__}: {line}", file=sys.stderr)
    _leave(code)


def _prints_error(code: int) -> bool:
    """Whether this rank prints the error. Without a process group yet, all ranks fail alike and rank 0 prints it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from ..parallel import first_to_fail

    first = first_to_fail()
    return (code == OUR_FAULT or os.environ.get("RANK", "0") == "0") if first is None else first


def _leave(code: int) -> None:
    """Exit at once: other ranks may be gone, and a clean shutdown would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _quiet() -> None:
    """Silence libraries' warnings and progress bars, and print the other warnings as one line without source code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides socket warnings; a lost rank is reported once anyway
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.formatwarning = lambda message, *_: wrapped(f"warning: {message}", sys.stderr) + "\n"
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|flash|modelopt|not a leaf Tensor|DTensor).*")
