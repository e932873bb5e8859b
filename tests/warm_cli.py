"""The command line in a process that is forked from a warm one, which has paid for the imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.limits import HANGS

__all__ = ["run_cli"]

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])


def run_cli(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `minitron ARGUMENTS` in `folder` and return what it wrote and its exit code."""
    with TemporaryDirectory() as kept:
        out, err = Path(kept, "out"), Path(kept, "err")
        child = FORKS.Process(target=_main, args=(list(arguments), dict(environment), folder, out, err))
        child.start()
        child.join(HANGS)
        if child.is_alive():
            child.kill()
            raise subprocess.TimeoutExpired(list(arguments), HANGS)
        assert child.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), child.exitcode, out.read_text(), err.read_text())


def _main(arguments: list[str], environment: dict[str, str], folder: Path | None, out: Path, err: Path) -> None:
    for path, descriptor in ((Path(os.devnull), 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for descriptor, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    sys.argv = ["minitron", *arguments]
    from minitron_megatron.__main__ import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
