"""A Python interpreter for tests of the command line whose processes are forked from one that has paid for the imports.

`PYTHON` in the environment of `launch/local.sh`, or as the program of a subprocess, it takes the arguments of `python`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tests.limits import HANGS

__all__ = ["PYTHON", "warm"]

PYTHON = Path(__file__).with_name("python")


def warm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which `PYTHON` is such an interpreter."""
    return {**environment, "PYTHON": str(PYTHON), "WARM_PYTHON": sys.executable, "WARM_SOCKET": str(_server())}


@cache
def _server() -> Path:
    """Start the process that is forked, and return its socket."""
    folder = mkdtemp(prefix="warm")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    socket = Path(folder, "socket")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    program = [sys.executable, Path(__file__).with_name("server.py"), socket]
    server = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    until = time.monotonic() + HANGS
    while not socket.exists():
        assert server.poll() is None and time.monotonic() < until, "the warm interpreter did not start"
        time.sleep(0.02)
    return socket
