"""Forks a process for each client: it has behind it what a process of a run does first."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any


def main(path: str) -> None:
    """Serve until killed; return in each process that is forked for a client once it is one of `minitron`."""
    import tests.warm.imports  # noqa: F401

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return serve(client)
        client.close()


def serve(client: socket.socket) -> None:
    """Fork the client's process and pass signals to it and its exit code back; it dies with its client."""
    length, files, _, _ = socket.recv_fds(client, 8, 3)
    message = b""
    while len(message) < int.from_bytes(length, "little"):
        if not (more := client.recv(65536)):
            os._exit(0)
        message += more
    child = os.fork()
    if child == 0:
        client.close()
        return become(json.loads(message), files)
    for file in files:
        os.close(file)
    end = os.pidfd_open(child)
    while end not in select.select([client, end], [], [])[0]:
        received = client.recv(1)
        os.kill(child, received[0] if received else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):
        client.sendall(code.to_bytes(4, "little", signed=True))
    os._exit(0)


def become(job: dict[str, Any], files: list[int]) -> None:
    """Take over a client's files, folder, environment, arguments and signals."""
    for own, file in enumerate(files):
        os.dup2(file, own)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(own, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for own, mode in enumerate("rww")
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, heard if number in job["heard"] else signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = ["minitron", *job["arguments"]]


if __name__ == "__main__":
    main(sys.argv[1])
    from minitron_megatron.__main__ import main as minitron

    minitron()
