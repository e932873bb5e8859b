"""The command `study`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .. import numbers
from .gc_tuning import restore_gc
from .running import carry_out, share

if TYPE_CHECKING:
    from ..studies import Plan

__all__ = ["list_studies", "run_study"]


def list_studies() -> None:
    """Print every study of the package."""
    from ..studies import describe_studies

    print(describe_studies())


def run_study(
    name: str,
    recipe: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    *,
    seeds: int,
    array: str,
    dry_run: bool,
) -> None:
    """Run a study, or one task of its array, on the launched processes; print its table once every run is done."""
    from ..errors import RecipeError
    from ..forecast import planned
    from ..parallel import Topology, launched
    from ..studies import LAST, check_job, load_study, plan_study, share_of

    if not name or recipe is None:
        raise RecipeError("give a study and a recipe: `minitron study NAME RECIPE`. `minitron study --list` has names.")
    plan = plan_study(name, load_study(name), recipe, overrides, out, seeds)
    jobs = share_of(plan.jobs, *share("--array", array)) if array else plan.jobs
    if dry_run:
        for job in plan.jobs:
            check_job(job, planned(job.recipe, launched("WORLD_SIZE", 0)))
        if launched("RANK", 0) == 0:
            _print_plan(plan)
        return
    topology = Topology.start(plan.jobs[0].recipe.parallel)
    restore_gc()
    for job in plan.jobs:
        check_job(job, topology)
    for number, job in enumerate(jobs, 1):
        if topology.rank == 0:
            print(f"run {number} of {len(jobs)}: {job.arm}, seed {job.seed}", flush=True)
        for each in job.runs:
            carry_out(each.recipe, topology, until=each.until or LAST, shared=plan.shared)
    if topology.rank == 0:
        _print_results(plan)


def _print_plan(plan: Plan) -> None:
    from ..report import text_table
    from ..studies import plan_rows

    rows = plan_rows(plan)
    cells = [[arm, str(seed), numbers.flops(flops), ", ".join(stages) or "none"] for arm, seed, stages, flops in rows]
    columns = ("arm", "seed", "compute", "stages that no run before it makes")
    Console().print(text_table(plan.study.title, columns, cells, words=columns[-1:]))
    runs, compute = numbers.counted(len(rows), "run"), numbers.flops(sum(row[3] for row in rows))
    print(f"{runs}, {compute}, in {shlex.quote(str(plan.folder))}")


def _print_results(plan: Plan) -> None:
    from ..report import study_notes, study_text
    from ..studies import collect, is_done, write_study

    left = [job for job in plan.jobs if not is_done(job)]
    if left:
        print(f"Done: {len(plan.jobs) - len(left)} of {len(plan.jobs)} runs. The last task writes the table.")
        return
    table = collect(plan)
    write_study(plan, table)
    Console().print(study_text(table))
    for line in (f"{plan.study.claim} ({plan.study.paper})", *(f"* {note}" for note in study_notes(table))):
        Console().print(Text(line))
    print(f"report: {plan.folder / 'report.html'}")
