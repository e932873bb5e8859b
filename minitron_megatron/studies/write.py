"""Write a study's table and plot, and describe studies and plans."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from ..files import whole_file, write_json
from ..forecast import count
from ..report import StudyTable, plot_study, study_markdown, study_page
from .jobs import Plan
from .study import Study, shipped

__all__ = ["describe_studies", "plan_rows", "write_study"]

PLOT = "table.png"
COLUMNS = 100


def write_study(plan: Plan, table: StudyTable) -> None:
    """Write `table.json`, `table.md`, `table.png` and `report.html` into the study's folder."""
    write_json(plan.folder / "table.json", table)
    plot_study(table, plan.folder / PLOT)
    with whole_file(plan.folder / "table.md") as partial:
        partial.write_text(study_markdown(table, PLOT), encoding="utf-8")
    with whole_file(plan.folder / "report.html") as partial:
        partial.write_text(study_page(table, plan.folder / PLOT), encoding="utf-8")


def plan_rows(plan: Plan) -> list[tuple[str, int, list[str], int]]:
    """Return (arm, seed, stages, their FLOPs) of each job, without the stages that a run before it makes.

    The stages of a family's run have its name before them: `8b/prune`.
    """
    rows = []
    for job, runs in plan.executions():
        named = [f"{run.name}/{stage}" if len(runs) > 1 else stage for run, stages in runs for stage in stages]
        flops = sum(sum(count(run.planned, gpus=1).stage_flops.get(stage, 0) for stage in of) for run, of in runs)
        rows.append((job.arm, job.seed, named, flops))
    return rows


def describe_studies() -> str:
    """Return every study of the package as text: name, claim, source and arms."""
    return "\n\n".join("\n".join(_described(name, study)) for name, study in shipped())


def _described(name: str, study: Study) -> Iterator[str]:
    yield f"{name}: {study.title}"
    told = f"{study.claim} ({study.paper})"
    needs = [f"Needs {', '.join(study.needs)} in the recipe."] if study.needs else []
    for part in (told, *needs, f"Arms: {' | '.join(study.arms)}."):
        yield from wrap(part, COLUMNS, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
