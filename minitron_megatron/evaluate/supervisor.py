"""Script that runs a program under limits: exit code 0 if and only if the program's last line ran.

Called as `python -I supervisor.py SECONDS UID KEPT SOURCE` in a folder of the program's own. The program runs in a
forked child. The supervisor sends the child a random token; while the program runs, the token lies on the interpreter's
evaluation stack, which no Python code can read. The child sends it back after the program's last line. Then all
processes that the program started are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
import types

__all__: list[str] = []

GIBIBYTE = 2**30
PROCESSES = 64
SUBREAPER, DUMPABLE, KEEP_CAPABILITIES, AMBIENT, RAISE = 36, 4, 8, 47, 2
"""Options of prctl(2)."""
prctl = ctypes.CDLL(None).prctl


def main() -> int:
    seconds, uid, kept, source = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with open(source, encoding="utf-8") as file:
        program = file.read()
    os.remove(source)
    prctl(SUBREAPER, 1, 0, 0, 0)  # adopt orphaned descendants
    prctl(DUMPABLE, 0, 0, 0, 0)  # other processes of this user cannot trace this one
    (token_in, token_out), (reply_in, reply_out) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(token_out)
        os.close(reply_in)
        _limit(seconds, uid, kept)
        _run(program, token_in, reply_out)
    os.close(token_in)
    os.close(reply_out)
    token = os.urandom(32)
    os.write(token_out, token)
    passed = _reply(reply_in, child, time.monotonic() + seconds) == token
    _kill_all()
    return 0 if passed else 1


def _limit(seconds: float, uid: int, kept: int) -> None:
    """Limit the program's resources. uid 0: keep the user, so the process limit includes the user's other processes."""
    processes = PROCESSES
    if uid:
        _become(uid, kept)
    else:
        processes += _threads(os.getuid())
    for which, most in (
        (resource.RLIMIT_AS, 4 * GIBIBYTE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, GIBIBYTE // 16),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_NPROC, processes),
    ):
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def _become(uid: int, kept: int) -> None:
    """Switch to another user and keep one capability, also across exec; kept -1: none."""
    prctl(KEEP_CAPABILITIES, int(kept >= 0), 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if kept >= 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1 << kept] * 3)
        if ctypes.CDLL(None).capset(header, sets) or prctl(AMBIENT, RAISE, kept, 0, 0):
            os._exit(1)


def _threads(uid: int) -> int:
    """Count a user's threads, as RLIMIT_NPROC does."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            pass
    return count


def _run(program: str, token_in: int, reply_out: int) -> None:
    """Run a program as `__main__`, then send the token back.

    os.write's arguments, the token among them, are evaluated first and lie where the program cannot see them.
    """
    leave = os._exit
    try:
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"], sys.argv = module, ["program"]
        os.write(reply_out, os.read(token_in, 32)[: exec(compile(program, "program", "exec"), module.__dict__)])  # type: ignore[func-returns-value]
    except BaseException:
        leave(1)
    leave(0)


def _reply(reply_in: int, child: int, until: float) -> bytes:
    """Return the bytes that the child sends before it ends, runs out of time or has too many processes."""
    found, ended = b"", False
    while len(found) < 32 and (left := until - time.monotonic()) > 0:
        if select.select([reply_in], [], [], 0 if ended else min(left, 0.05))[0]:
            part = os.read(reply_in, 33)
            if not part:
                break
            found += part
        elif ended or len(_descendants(os.getpid())) > PROCESSES:  # no process limit applies to root
            break
        else:
            ended = os.waitpid(child, os.WNOHANG)[0] == child
    return found


def _kill_all() -> None:
    """Kill and reap all descendants, including orphans that this process adopted."""
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            return


def _descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
        except OSError:
            pass
    found, new = [], [root]
    while new:
        new = [kid for pid in new for kid in parents.get(pid, [])]
        found += new
    return found


if __name__ == "__main__":
    code = main()
    os._exit(code)
