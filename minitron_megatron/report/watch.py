"""Follow a running job from another terminal, by the files of its run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from .progress_table import run_state

__all__ = ["watch"]


def watch(
    run: Path,
    console: Console | None = None,
    *,
    every: float = 1.0,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the state of a run, again each `every` seconds until its command ends. Not on a terminal: once.

    Raises CheckpointError if the folder is not a run folder.
    """
    console = console or Console()
    state = run_state(run, clock())
    if not console.is_terminal:
        console.print(state.shown(run))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(state.shown(run), refresh=True)
            if state.over:
                return
            sleep(every)
            state = run_state(run, clock())
