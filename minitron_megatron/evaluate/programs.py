"""Programs that a model wrote, run against their tests, isolated as far as this machine allows.

A program passes if its last line ran, in time: `supervisor.py` proves it by a token that the program cannot see. Code
that reads its own process's raw memory, or that makes its tests compare anything as equal, could still cheat: nothing
that shares an interpreter with its tests can be kept from that.
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

__all__ = ["Isolation", "candidates", "isolation", "passes", "share_that_pass"]

SECONDS = 10.0
GRACE = 10.0
"""After its own time, the supervisor itself is killed."""
SUPERVISOR = Path(__file__).with_name("supervisor.py")
LIMITS = "limits on time, memory (4 GiB a process), processes (64), file size (64 MiB) and open files (256)"
TRIED = "import collections, decimal, json, math, random, re, threading\nopen('here', 'w').close()\n"
"""A program that any isolation has to let pass."""


@dataclass(frozen=True)
class Isolation:
    """Way of running the supervisor."""

    spaces: Literal["bubblewrap", "unshare", "limits"]
    user: Literal["own", "reader", "same"]
    """`own`: a user without rights, for this program alone. `reader`: it may read all files, for an interpreter that
    others may not read. `same`: the user who runs this. Only root can have the first two, and needs them: the kernel
    does not count root's processes."""

    @property
    def said(self) -> str:
        """One line for results."""
        spaces = {
            "bubblewrap": "namespaces of bubblewrap (no network, files read-only, no other processes in view)",
            "unshare": "namespaces of unshare (no network, no other processes in view)",
            "limits": "no namespaces (network, files and other processes within reach of its user)",
        }
        users = {
            "own": "as a user without rights",
            "reader": "as a user that may read all files",
            "same": "as the user who runs this",
        }
        return f"{spaces[self.spaces]}; {users[self.user]}; {LIMITS}"

    @property
    def kept(self) -> int:
        """Number of the capability that a program keeps, CAP_DAC_READ_SEARCH; -1: none."""
        return 2 if self.user == "reader" else -1

    def command(self, folder: str) -> list[str]:
        """What comes before the supervisor's own command."""
        root = os.geteuid() == 0
        if self.spaces == "unshare":
            whose = [] if root else ["--user", "--map-current-user"]
            spaces = ["--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child"]
            return ["unshare", *whose, *spaces, "--"]
        if self.spaces == "bubblewrap":
            spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
            rights = [f"CAP_{name}" for name in ("SETUID", "SETGID", "DAC_READ_SEARCH")] if self.user != "same" else []
            whose = [each for right in rights for each in ("--cap-add", right)] if root else ["--unshare-user"]
            files = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", folder, folder]
            return ["bwrap", *spaces, *whose, *files, "--chdir", folder, "--"]
        return []


@cache
def isolation() -> Isolation:
    """The strongest isolation that works here; limits alone always do."""
    *better, last = candidates()
    return next((each for each in better if passes(TRIED, how=each)), last)


def candidates() -> list[Isolation]:
    """All kinds, the strongest first."""
    users: tuple[Literal["own", "reader", "same"], ...] = ("own", "reader", "same") if os.geteuid() == 0 else ("same",)
    kinds: tuple[Literal["bubblewrap", "unshare", "limits"], ...] = ("bubblewrap", "unshare", "limits")
    return [Isolation(spaces, user) for spaces in kinds for user in users]


def passes(program: str, seconds: float = SECONDS, how: Isolation | None = None) -> bool:
    """Whether a program, its tests included, runs to its end in a process of its own. how: None: the strongest."""
    how = how or isolation()
    with TemporaryDirectory() as folder:
        source = Path(folder) / "program"
        source.write_bytes(program.encode("utf-8", "replace"))
        uid = 61184 + secrets.randbelow(4336) if how.user != "same" else 0  # systemd keeps these for such use
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


def share_that_pass(programs: Sequence[str], tests: str) -> float:
    """The mean over programs: pass@1, whose unbiased estimate it is."""
    isolation()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return sum(threads.map(lambda program: passes(f"{program}\n{tests}\n"), programs)) / len(programs)
