"""Programs that a model wrote, run against their tests. Nothing but limits of time and memory and a folder of their own
stands between them and what the user may do on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from tempfile import TemporaryDirectory

__all__ = ["passes", "share_that_pass"]

SECONDS = 10.0
BYTES = 4 * 2**30
PASSED = 42
"""What the runner alone ends with, after the last line: a program that exits by itself has not passed."""
RUNNER = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
os._exit({PASSED})
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program, its tests included, runs to its end in a process of its own."""
    with TemporaryDirectory() as folder:
        runner = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                runner.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        finally:
            _end(runner)
        return runner.returncode == PASSED


def _end(runner: subprocess.Popen) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()


def share_that_pass(programs: Sequence[str], tests: str) -> float:
    """The mean over programs: pass@1, whose unbiased estimate it is."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return sum(threads.map(lambda program: passes(f"{program}\n{tests}\n"), programs)) / len(programs)
