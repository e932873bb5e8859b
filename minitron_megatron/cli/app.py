"""Commands of the command line. `tests/cli/test_surface.py` holds the full list; a new command changes it too."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ..gpus import MFU
from ..run_folder import RunFolder
from .family import print_steps, run_family
from .gc_tuning import restore_gc
from .interrupt import Interrupted, raise_if_interrupted
from .options import Out, RecipePath, Set
from .printing import print_bench, print_comparison, print_made, print_report
from .rehearse import rehearse
from .running import carry_out, reported, share, start
from .sample import sample

if TYPE_CHECKING:
    from ..parallel import Topology
    from ..recipe import Recipe

__all__ = ["app"]


class _Commands(typer.core.TyperGroup):
    """Command group that turns Ctrl-C into `Interrupted`, which typer does not catch."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    name="minitron",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


RUN, STAGE, LOOK, PLAN = "Run", "Single stages", "Look", "Plan"
"""Groups of the commands in the help."""


def _print_version(wanted: bool) -> None:
    from .. import __version__

    if wanted:
        print(f"minitron {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune and distil a pretrained LLM on Megatron-Core."""


Format = Literal["hf", "megatron"]
Backend = Literal["trtllm", "vllm", "torch"]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print which stages would run, and why.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs; by default the layout's minimum.")
]
Memory = Annotated[
    float, typer.Option("--memory", metavar="GIB", min=0.001, help="GiB per GPU; an estimate above it is an error.")
]
Mfu = Annotated[
    float, typer.Option("--mfu", metavar="SHARE", min=0.01, max=1.0, help="Model FLOPs utilisation: share of the peak.")
]


@app.command(rich_help_panel=RUN)
def run(recipe: RecipePath, overrides: Set = None, out: Out = None, dry_run: DryRun = False) -> None:
    """Run all stages in order. Finished stages are skipped, and an interrupted one resumes."""
    if dry_run:
        print_steps(recipe, overrides, out)
    else:
        _run(recipe, overrides, out)


def _stage_command(stage: str, help_text: str) -> None:
    """Add a command that runs one stage."""

    def command(recipe: RecipePath, overrides: Set = None, out: Out = None) -> None:
        _run(recipe, overrides, out, only=stage)

    app.command(stage, help=help_text, rich_help_panel=STAGE)(command)


_stage_command("prepare", "Tokenize the text.")
_stage_command("calibrate", "Tokenize the calibration text of score.sources.")
_stage_command("correct", "Fine-tune the teacher on the distillation data.")
_stage_command("score", "Measure the importance of every unit.")


@app.command(rich_help_panel=STAGE)
def search(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    task: Annotated[
        str, typer.Option("--task", metavar="I/N", help="Measure only share I of N (from 0); others run in parallel.")
    ] = "",
) -> None:
    """Search the student's shape within a budget."""
    if task:
        _search_task(recipe, overrides, out, task)
    else:
        _run(recipe, overrides, out, only="search")


_stage_command("prune", "Prune the teacher to the student's shape by importance.")
_stage_command("distill", "Distil the teacher into the pruned student.")
_stage_command("align", "Align the student: every round of fine-tuning and preference optimisation.")
_stage_command("baseline", "Distil the teacher into a random student of the same shape.")


@app.command(rich_help_panel=STAGE)
def evaluate(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Hugging Face folder, instead of the run's models.")
    ] = None,
) -> None:
    """Evaluate every model of the run, or any other model, on held-out text and tasks."""
    if model is None:
        _run(recipe, overrides, out, only="evaluate")
    else:
        _evaluate_folder(recipe, overrides, out, model)


app.command(rich_help_panel=STAGE)(sample)


@app.command(rich_help_panel=STAGE)
def export(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="New folder, instead of the run's.")] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="newest|best|STEP", help="Training checkpoint of distillation.")
    ] = "",
    form: Annotated[Format, typer.Option("--format", help="Hugging Face's, or Megatron-LM's (torch_dist).")] = "hf",
    check: Annotated[bool, typer.Option("--check", help="Compare transformers' logits with the student's.")] = False,
) -> None:
    """Write the student as a Hugging Face folder; with --to, any of its checkpoints in either format."""
    from ..errors import RecipeError

    if to is not None and check:
        raise RecipeError("--check works only on the run's own export. Remove --to or --check.")
    if to is None and (checkpoint or form != "hf"):
        raise RecipeError("--checkpoint and --format need a separate folder. Give one with --to.")
    if to is None:
        done = _run(recipe, overrides, out, only="export")
        if check:
            _check_export(*done)
    else:
        _hand_over(recipe, overrides, out, to, checkpoint, form)


@app.command(rich_help_panel=PLAN)
def init(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A Hugging Face folder, OWNER/NAME[@REVISION], or a Megatron checkpoint."),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="The tokenizer of a Megatron checkpoint.")
    ] = None,
) -> None:
    """Print a starter recipe for a model."""
    from ..recipe import starter_recipe

    print(starter_recipe(model, tokenizer), end="")


@app.command(rich_help_panel=PLAN)
def estimate(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    gpus: Gpus = None,
    mfu: Mfu = MFU,
    memory: Memory = 80.0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print only the lines that submit the job.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Search the layout: the best few are rehearsed.")] = False,
) -> None:
    """Estimate shapes, parameters, memory, FLOPs and hours. Needs no GPU and no weights."""
    from ..errors import RecipeError
    from .estimate import print_estimate, print_plan

    if plan and mfu != MFU:
        raise RecipeError("--plan models the time of a step, and --mfu assumes it. Give one of them.")
    if plan and slurm:
        raise RecipeError("--plan prints a layout and --slurm the lines of a job. Give one of them.")
    if plan:
        print_plan(recipe, overrides or [], out, gpus=gpus, memory=memory)
        return
    print_estimate(recipe, overrides or [], out, gpus=gpus, mfu=mfu, memory=memory, slurm=slurm)


app.command(rich_help_panel=PLAN)(rehearse)


@app.command(rich_help_panel=LOOK)
def bench(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    backend: Annotated[
        Backend, typer.Option("--backend", help="trtllm-bench, `vllm bench throughput`, or torch in this process.")
    ] = "trtllm",
) -> None:
    """Measure the serving throughput of teacher and student."""
    from ..recipe import load_recipe
    from ..report import Progress, fan_out
    from ..run import bench as measure

    loaded = load_recipe(recipe, overrides or (), out)
    restore_gc()
    with Progress() as progress:
        rows = measure(loaded, backend, listener=fan_out(raise_if_interrupted, progress))
    print_bench(RunFolder(loaded.out), backend, rows)


@app.command(rich_help_panel=RUN)
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A study of `--list`, or a YAML file of yours.")] = "",
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.")] = None,
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of all studies, by default OUT-studies.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, max=1000, help="Runs per arm, from the recipe's seed on.")
    ] = 3,
    array: Annotated[str, typer.Option("--array", metavar="I/N", help="Only task I of N (from 0) of an array.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the runs, and the stages they share.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Print each study, its claim and its arms.")] = False,
) -> None:
    """Compare variants of a recipe over several seeds, as the papers' tables do."""
    from .study import list_studies, run_study

    if listed:
        list_studies()
    else:
        run_study(name, recipe, overrides or [], out, seeds=seeds, array=array, dry_run=dry_run)


@app.command(rich_help_panel=LOOK)
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A scores file, plan, model or run folder.")],
) -> None:
    """Describe a scores file, a plan, a model or a run folder."""
    from ..report import describe

    Console().print(describe(path))


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run folder, or several to compare.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder of a comparison, by default ./comparison.")
    ] = None,
) -> None:
    """Write the report of a run, an HTML page with tables and plots; of several runs a page that compares them."""
    from ..errors import RecipeError
    from ..report import report_run

    if len(runs) > 1:
        print_comparison(runs, to or Path("comparison"))
    elif to is not None:
        raise RecipeError("--to is the folder of a comparison of several runs. Give more runs, or leave it out.")
    else:
        print(report_run(runs[0]))


@app.command(rich_help_panel=LOOK)
def watch(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Follow a running job until it ends; Ctrl-C stops. When output is not a terminal, print once and exit."""
    from ..report import watch as follow

    with suppress(KeyboardInterrupt):
        follow(run)


@app.command(rich_help_panel=PLAN)
def schema() -> None:
    """Print the recipe's JSON Schema."""
    print((Path(__file__).parents[1] / "recipe" / "schema.json").read_text(encoding="utf-8"), end="")


def _run(path: Path, overrides: list[str] | None, out: Path | None, only: str | None = None) -> tuple[Recipe, Topology]:
    """Run a recipe's stages on the launched processes, then write the report on rank 0.

    Returns the recipe and the topology.
    """
    recipe, topology = start(path, overrides, out)
    if recipe.family and only is None:
        run_family(recipe, topology)
        return recipe, topology
    carry_out(recipe, topology, only=only)
    if topology.rank == 0:
        print_made(recipe, only)
        if only is None:
            print_report(recipe.out)
    return recipe, topology


def _hand_over(
    path: Path, overrides: list[str] | None, out: Path | None, to: Path, checkpoint: str, form: Format
) -> None:
    from ..model import MEGATRON_FLAGS
    from ..run import hand_over

    recipe, topology = start(path, overrides, out)
    with reported(recipe, topology) as listener:
        source = hand_over(recipe, topology, to, checkpoint=checkpoint, form=form, listener=listener)
    if topology.rank != 0:
        return
    print(f"{source} -> {to}")
    if form == "megatron":
        print((to / MEGATRON_FLAGS).read_text(encoding="utf-8"), end="")


def _evaluate_folder(path: Path, overrides: list[str] | None, out: Path | None, model: Path) -> None:
    from ..records import read_summary
    from ..report import print_summary
    from ..run import evaluate_folder

    recipe, topology = start(path, overrides, out)
    with reported(recipe, topology) as listener:
        row = evaluate_folder(recipe, topology, model, listener=listener)
    if topology.rank == 0:
        print_summary([*read_summary(RunFolder(recipe.out).summary), row])


def _check_export(recipe: Recipe, topology: Topology) -> None:
    from ..run import check_export

    difference = check_export(recipe, topology)
    if topology.rank == 0:
        within = f", to within {difference:.1e}" if difference else ""
        print(f"{RunFolder(recipe.out).model('export')}: transformers gives the student's logits{within}")


def _search_task(path: Path, overrides: list[str] | None, out: Path | None, task: str) -> None:
    from ..report import MetricsFile
    from ..run import search_task

    number, count = share("--task", task)
    recipe, topology = start(path, overrides, out)
    with reported(recipe, topology, MetricsFile(RunFolder(recipe.out).metrics)) as listener:
        found = search_task(recipe, topology, number, count, listener=listener)
    if topology.rank == 0:
        print(found)
