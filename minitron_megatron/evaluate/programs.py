"""Runs programs that a model wrote against their tests, isolated as far as this machine allows.

A program passes if its last line runs in time; `supervisor.py` proves this by a token that the program cannot see. Code
that reads its own process's raw memory, or that makes all comparisons of its tests equal, could still cheat: this
cannot be prevented for code that shares an interpreter with its tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

__all__ = ["Isolation", "candidates", "isolation", "passes", "share_that_pass", "which_pass"]

SECONDS = 10.0
GRACE = 10.0
"""Seconds after its time limit at which the supervisor itself is killed."""
SUPERVISOR = Path(__file__).with_name("supervisor.py")
LIMITS = "limits on time, memory (4 GiB a process), processes (64), file size (64 MiB) and open files (256)"
PROBE = "import collections, decimal, json, math, random, re, threading\nopen('here', 'w').close()\n"
"""Program that must pass under an isolation for it to be used."""


@dataclass(frozen=True)
class Isolation:
    """A way to isolate the supervisor and its program."""

    spaces: Literal["bubblewrap", "unshare", "limits"]
    user: Literal["own", "reader", "same"]
    """`own`: an unprivileged user for this program alone. `reader`: such a user with read access to all files, for an
    interpreter that other users cannot read. `same`: the current user. Only root can use the first two, and needs them:
    the kernel's process limit does not apply to root."""

    @property
    def description(self) -> str:
        """Description in one line, for the results."""
        spaces = {
            "bubblewrap": "bubblewrap namespaces (no network, files read-only, other processes hidden)",
            "unshare": "unshare namespaces (no network, other processes hidden)",
            "limits": "no namespaces (network, files and other processes within reach of the user)",
        }
        users = {
            "own": "as an unprivileged user",
            "reader": "as a user with read access to all files",
            "same": "as the current user",
        }
        return f"{spaces[self.spaces]}; {users[self.user]}; {LIMITS}"

    @property
    def kept(self) -> int:
        """Number of the capability that the program keeps (CAP_DAC_READ_SEARCH); -1: none."""
        return 2 if self.user == "reader" else -1

    def command(self, folder: str) -> list[str]:
        """Return the command prefix that puts the supervisor into its namespaces."""
        root = os.geteuid() == 0
        if self.spaces == "unshare":
            user = [] if root else ["--user", "--map-current-user"]
            spaces = ["--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child"]
            return ["unshare", *user, *spaces, "--"]
        if self.spaces == "bubblewrap":
            spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
            capabilities = (
                [f"CAP_{name}" for name in ("SETUID", "SETGID", "DAC_READ_SEARCH")] if self.user != "same" else []
            )
            user = [each for name in capabilities for each in ("--cap-add", name)] if root else ["--unshare-user"]
            files = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", folder, folder]
            return ["bwrap", *spaces, *user, *files, "--chdir", folder, "--"]
        return []


@cache
def isolation() -> Isolation:
    """Return the strongest isolation that works on this machine; limits alone always work."""
    *better, last = candidates()
    return next((each for each in better if passes(PROBE, how=each)), last)


def candidates() -> list[Isolation]:
    """Return all ways of isolation, the strongest first."""
    users: tuple[Literal["own", "reader", "same"], ...] = ("own", "reader", "same") if os.geteuid() == 0 else ("same",)
    kinds: tuple[Literal["bubblewrap", "unshare", "limits"], ...] = ("bubblewrap", "unshare", "limits")
    return [Isolation(spaces, user) for spaces in kinds for user in users]


def passes(program: str, seconds: float = SECONDS, how: Isolation | None = None) -> bool:
    """Return whether a program with its tests runs to its end in its own process. how: None: the strongest way."""
    how = how or isolation()
    with TemporaryDirectory() as folder:
        source = Path(folder) / "program"
        source.write_bytes(program.encode("utf-8", "replace"))
        uid = (
            61184 + secrets.randbelow(4336) if how.user != "same" else 0
        )  # systemd reserves these ids for dynamic users
        if uid:
            os.chown(folder, uid, uid)
        before = how.command(folder)
        if before and not shutil.which(before[0]):
            return False
        own = [sys.executable, "-I", str(SUPERVISOR), str(seconds), str(uid), str(how.kept), str(source)]
        supervisor = subprocess.Popen(
            [*before, *own],
            executable=shutil.which(before[0]) if before else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", "HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                supervisor.wait(timeout=seconds + GRACE)
        finally:
            if supervisor.poll() is None:
                os.killpg(supervisor.pid, signal.SIGKILL)
                supervisor.wait()
        return supervisor.returncode == 0


def which_pass(programs: Sequence[str]) -> list[bool]:
    """Return whether each program with its tests runs to its end; as many run at a time as there are CPUs."""
    isolation()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(passes, programs))


def share_that_pass(programs: Sequence[str], tests: str) -> float:
    """Return the share of programs that pass: an unbiased estimate of pass@1."""
    return sum(which_pass([f"{program}\n{tests}\n" for program in programs])) / len(programs)
