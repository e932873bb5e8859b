"""Running of recipes with progress, metrics and the watchdog, for every command that does so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..events import Listener
from ..run_folder import RunFolder
from .gc_tuning import restore_gc
from .interrupt import raise_if_interrupted

if TYPE_CHECKING:
    from ..parallel import Topology
    from ..recipe import Recipe
    from ..run import SharedStages

__all__ = ["carry_out", "reported", "share", "start"]


def start(path: Path, overrides: list[str] | None, out: Path | None) -> tuple[Recipe, Topology]:
    """Load a recipe and set up the topology of the launched processes. Collective over them."""
    from ..parallel import Topology
    from ..recipe import load_recipe, with_keys_in_errors

    recipe = load_recipe(path, overrides or (), out)
    with with_keys_in_errors("parallel"):
        topology = Topology.start(recipe.parallel)
    restore_gc()
    return recipe, topology


def carry_out(
    recipe: Recipe,
    topology: Topology,
    *,
    only: str | None = None,
    until: str | None = None,
    shared: SharedStages | None = None,
) -> None:
    """Run a recipe's stages, as `run.run` does, and report them. Collective over the world."""
    from ..recipe import with_keys_in_errors
    from ..report import Machine, MetricsFile, fan_out, logged
    from ..run import run

    more: list[Listener] = []
    with ExitStack() as held:
        if topology.rank == 0:
            held.enter_context(with_keys_in_errors("log"))
            log = held.enter_context(logged(recipe.out, recipe.model_dump(mode="json"), **recipe.log.model_dump()))
            metrics = fan_out(MetricsFile(RunFolder(recipe.out).metrics), log)
            more = [metrics, Machine(metrics)]
        listener = held.enter_context(reported(recipe, topology, *more))
        run(recipe, topology, only=only, until=until, shared=shared, listener=listener)


@contextmanager
def reported(recipe: Recipe, topology: Topology, *more: Listener) -> Iterator[Listener]:
    """Yield a listener of work: Ctrl-C, the watchdog and, on rank 0, progress and `more`."""
    from ..report import Progress, Watchdog, fan_out

    watchdog = Watchdog(recipe.out, topology.rank, recipe.hang_seconds)
    if topology.rank != 0:
        with watchdog:
            yield fan_out(raise_if_interrupted, watchdog)
        return
    with Progress() as progress, watchdog:
        yield fan_out(raise_if_interrupted, progress, *more, watchdog)


def share(option: str, text: str) -> tuple[int, int]:
    """Return (task, tasks) of an option's value `I/N`. Raises RecipeError for any other text."""
    from ..errors import RecipeError

    number, _, count = text.partition("/")
    if not number.isdecimal() or not count.isdecimal():
        raise RecipeError(f"{option} {text!r} does not have the form I/N, such as 0/6 for the first of six tasks.")
    return int(number), int(count)
