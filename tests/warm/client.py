"""Runs `minitron ARGUMENTS` in a process that the server forks: passes on files, signals, and the exit code."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Return the exit code, or the negative number of the signal that ended the process."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(os.environ["WARM_SOCKET"])
    heard = [int(number) for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    job = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ), "heard": heard}
    message = json.dumps(job).encode()
    socket.send_fds(server, [len(message).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(message)
    for number in heard:
        signal.signal(number, lambda received, frame: server.send(bytes([received])))
    return int.from_bytes(server.recv(4), "little", signed=True)


if __name__ == "__main__":
    code = main()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
