"""Lines that a command prints about what it did, or would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..run_folder import RunFolder

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..report import BenchRow

__all__ = ["print_bench", "print_comparison", "print_dry_run", "print_made", "print_report"]


def print_bench(folder: RunFolder, backend: str, rows: Sequence[BenchRow]) -> None:
    """Print the speeds of a benchmark, draw its ratios, and tell what to run where its server is not installed."""
    from rich.console import Console

    from ..report import bench_tables, plot_bench
    from ..serve import SERVERS

    for table in bench_tables(rows):
        Console().print(table)
    if plot := plot_bench(rows, folder.bench / "ratios.png", paper=backend == "trtllm"):
        print(f"plot: {plot}")
    if backend != "torch" and any(row["student"] is None for row in rows):
        server, commands = SERVERS[backend], folder.bench / backend / "commands.sh"
        print(f"`{server.tool}` is not installed here. In {server.name}'s container, run: sh {commands}")
        print("Then run this command again. Or use `--backend torch` to compare the models on this machine.")


def print_made(recipe: Recipe, only: str | None) -> None:
    """Print what the command's stage made, or a search chose, and whether there was nothing to do."""
    from rich.console import Console

    from ..files import read_as
    from ..records import read_status
    from ..report import SearchTable, front_table, made_by
    from ..run import wanted

    folder = RunFolder(recipe.out)
    status = read_status(folder.status)
    if status and "ran" not in status["stages"].values():
        print(f"Nothing to do: {f'the stage {only}' if only else 'every stage'} is done already.")
    stage = only or ("search" if recipe.search else "")
    for each in wanted(recipe):
        if stage and each.is_called(stage) and (words := made_by(recipe.out, each.name)):
            print(f"{each.name}: {words}; in {each.makes(folder)}")
            if each.is_called("search") and (front := front_table(read_as(folder.search_table, SearchTable))):
                Console().print(front)


def print_report(out: Path) -> None:
    """Print the summary of a run, write its report, and print where both are."""
    from ..records import read_summary
    from ..report import print_summary, report_run

    print_summary(read_summary(RunFolder(out).summary))
    print(f"report: {report_run(out)}")
    print(f"export: {RunFolder(out).model('export')}")


def print_comparison(runs: Sequence[Path], to: Path) -> None:
    """Write a page that compares runs, and print where it is."""
    from ..files import read_text
    from ..recipe import read_yaml
    from ..report import compare_runs

    recipes = {run: read_yaml(read_text(RunFolder.existing(run).recipe)) for run in runs}
    print(compare_runs({run: keys if isinstance(keys, dict) else {} for run, keys in recipes.items()}, to))


def print_dry_run(recipe: Recipe, until: str | None = None) -> None:
    """Print what a run would do, up to a stage."""
    from ..run import dry_run

    for step in dry_run(recipe):
        print(f"{step.stage:<10} {step.state}{': ' + step.why if step.why else ''}")
        if step.stage == until:
            break
