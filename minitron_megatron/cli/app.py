"""The verbs. The list is frozen: `tests/cli/test_surface.py` holds it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from ..run_folder import RunFolder
from .gc_tuning import restore_gc
from .interrupt import Interrupted, raise_if_interrupted

__all__ = ["app"]


class _Verbs(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    name="minitron",
    cls=_Verbs,
    help="Prune and distil a pretrained LLM on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Format = Literal["hf", "megatron"]
Backend = Literal["trtllm", "torch"]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a recipe key; repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, instead of the recipe's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say which stages would run, and why.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Processes; by default tp x pp.")]
Memory = Annotated[float, typer.Option("--memory", min=0.001, help="GiB of a GPU; more than that is refused.")]
Mfu = Annotated[float, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the peak FLOPs reached.")]


@app.command()
def run(recipe: RecipePath, overrides: Set = None, out: Out = None, dry_run: DryRun = False) -> None:
    """Run every stage in order; done stages are skipped, a killed one resumes."""
    if dry_run:
        _print_steps(recipe, overrides, out)
    else:
        _run(recipe, overrides, out)


def _verb(stage: str, help_text: str) -> None:
    """Adds the verb that runs one stage."""

    def command(recipe: RecipePath, overrides: Set = None, out: Out = None) -> None:
        _run(recipe, overrides, out, only=stage)

    app.command(stage, help=help_text)(command)


_verb("prepare", "Text to tokens.")
_verb("correct", "Fine-tune the teacher on the distillation data.")
_verb("score", "Measure the importance of every unit.")


@app.command()
def search(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    task: Annotated[
        str, typer.Option("--task", metavar="I/N", help="Only share I of N, from 0, beside other tasks at work.")
    ] = "",
) -> None:
    """Find the shape within a budget."""
    if task:
        _search_task(recipe, overrides, out, task)
    else:
        _run(recipe, overrides, out, only="search")


_verb("prune", "Choose what stays and cut the rest.")
_verb("distill", "Distil the teacher into the pruned student.")
_verb("baseline", "Distil the teacher into a random student of the same shape.")


@app.command()
def evaluate(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="A Hugging Face folder, instead of the run's models.")
    ] = None,
) -> None:
    """Measure every model on held-out text and tasks; or any other model on the same."""
    if model is None:
        _run(recipe, overrides, out, only="evaluate")
    else:
        _evaluate_folder(recipe, overrides, out, model)


@app.command()
def export(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="A new folder, instead of the run's.")] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="newest|best|STEP", help="Of distillation, at work or retained.")
    ] = "",
    form: Annotated[Format, typer.Option("--format", help="Hugging Face's, or Megatron-LM's (torch_dist).")] = "hf",
    check: Annotated[bool, typer.Option("--check", help="Compare transformers' logits of the run's export.")] = False,
) -> None:
    """Write the student as a Hugging Face folder; or any checkpoint of it, in either format, to another."""
    from ..errors import RecipeError

    if to is not None and check:
        raise RecipeError("--check is of the run's own export. Leave --to out.")
    if to is None and (checkpoint or form != "hf"):
        raise RecipeError("a checkpoint, or another format, needs a folder of its own. Give one with --to.")
    if to is None:
        done = _run(recipe, overrides, out, only="export")
        if check:
            _check_export(*done)
    else:
        _hand_over(recipe, overrides, out, to, checkpoint, form)


@app.command()
def init(model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")]) -> None:
    """Print a starter recipe for a Hugging Face folder."""
    from ..recipe import starter_recipe

    print(starter_recipe(model), end="")


@app.command()
def estimate(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    gpus: Gpus = None,
    mfu: Mfu = 0.4,
    memory: Memory = 80.0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print the lines that submit it, and no more.")] = False,
) -> None:
    """Count shapes, parameters, bytes, FLOPs and hours; needs no GPU and no weights."""
    from ..forecast import estimate as count
    from ..forecast import slurm_commands
    from ..recipe import load_recipe
    from ..report import candidates_table, pairs_table

    found = count(load_recipe(recipe, overrides or (), out), gpus=gpus, mfu=mfu)
    if slurm:
        found.expect_to_fit(memory)
        arguments = [part for each in overrides or () for part in ("--set", each)] + (
            ["--out", str(out)] if out else []
        )
        print(slurm_commands(recipe, arguments, found), end="")
        return
    Console().print(pairs_table(str(recipe), found.rows()))
    if found.candidates:
        Console().print(candidates_table(found.candidate_rows()))
    found.expect_to_fit(memory)


@app.command()
def bench(
    recipe: RecipePath,
    overrides: Set = None,
    out: Out = None,
    backend: Annotated[Backend, typer.Option("--backend", help="trtllm-bench, or torch in this process.")] = "trtllm",
) -> None:
    """Measure how fast teacher and student serve."""
    from ..recipe import load_recipe
    from ..report import Progress, bench_table, fan_out, plot_bench
    from ..run import bench as measure

    loaded = load_recipe(recipe, overrides or (), out)
    restore_gc()
    with Progress() as progress:
        rows = measure(loaded, backend, listener=fan_out(raise_if_interrupted, progress))
    Console().print(bench_table(rows))
    if plot := plot_bench(rows, RunFolder(loaded.out).bench / "ratios.png"):
        print(f"plot: {plot}")
    if backend == "trtllm" and any(row["student"] is None for row in rows):
        commands = RunFolder(loaded.out).bench / "commands.sh"
        print(f"trtllm-bench is not installed here. In TensorRT-LLM's container: sh {commands}")
        print("Then run this again, or `--backend torch` for a ratio on this machine.")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A scores, plan, model or run file or folder.")],
) -> None:
    """Say what a scores file, a plan, a model folder or a run folder holds."""
    from ..report import describe

    Console().print(describe(path))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Draw the tables and plots of a run."""
    from ..report import report_run

    print(report_run(run))


@app.command()
def watch(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Follow a run at work, from any terminal; Ctrl-C ends the looking. Off a terminal it looks once."""
    from ..report import Progress
    from ..report import watch as follow

    console = Console()
    with Progress(console, short_seconds=0.0) as progress, suppress(KeyboardInterrupt):
        follow(run, progress, goes_on=lambda: console.is_terminal)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema."""
    from ..recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def _begun(path: Path, overrides: list[str] | None, out: Path | None) -> tuple[Any, Any]:
    """A recipe and the topology of the processes that were started for it. Collective over them."""
    from ..parallel import Topology
    from ..recipe import load_recipe

    recipe = load_recipe(path, overrides or (), out)
    topology = Topology.start(**recipe.parallel.model_dump())
    restore_gc()
    return recipe, topology


def _run(path: Path, overrides: list[str] | None, out: Path | None, only: str | None = None) -> tuple[Any, Any]:
    """Runs a recipe's stages over the processes that were started, then draws the report on the first.

    Returns the recipe and the topology of those processes.
    """
    from ..report import Machine, MetricsFile, Progress, Watchdog, fan_out, logged
    from ..run import run as run_stages

    recipe, topology = _begun(path, overrides, out)
    watchdog = Watchdog(recipe.out, topology.rank, recipe.hang_seconds)
    if topology.rank != 0:
        with watchdog:
            run_stages(recipe, topology, only=only, listener=fan_out(raise_if_interrupted, watchdog))
        return recipe, topology
    told = recipe.model_dump(mode="json")
    with logged(recipe.out, told, **recipe.log.model_dump()) as log, Progress() as progress, watchdog:
        kept = fan_out(MetricsFile(RunFolder(recipe.out).metrics), log)
        heard = fan_out(raise_if_interrupted, progress, kept, Machine(kept), watchdog)
        run_stages(recipe, topology, only=only, listener=heard)
    if only is None:
        _print_report(recipe.out)
    return recipe, topology


def _hand_over(path: Path, overrides: list[str] | None, out: Path | None, to: Path, checkpoint: str, form: Any) -> None:
    from ..model import MEGATRON_FLAGS
    from ..report import Progress, fan_out
    from ..run import hand_over

    recipe, topology = _begun(path, overrides, out)
    if topology.rank != 0:
        hand_over(recipe, topology, to, checkpoint=checkpoint, form=form)
        return
    with Progress() as progress:
        heard = fan_out(raise_if_interrupted, progress)
        source = hand_over(recipe, topology, to, checkpoint=checkpoint, form=form, listener=heard)
    print(f"{source} -> {to}")
    if form == "megatron":
        print((to / MEGATRON_FLAGS).read_text(encoding="utf-8"), end="")


def _evaluate_folder(path: Path, overrides: list[str] | None, out: Path | None, model: Path) -> None:
    from ..records import read_summary
    from ..report import Progress, fan_out, print_summary
    from ..run import evaluate_folder

    recipe, topology = _begun(path, overrides, out)
    if topology.rank != 0:
        evaluate_folder(recipe, topology, model)
        return
    with Progress() as progress:
        row = evaluate_folder(recipe, topology, model, listener=fan_out(raise_if_interrupted, progress))
    print_summary([*read_summary(RunFolder(recipe.out).summary), row])


def _check_export(recipe: Any, topology: Any) -> None:
    from ..run import check_export

    apart = check_export(recipe, topology)
    if topology.rank == 0:
        print(f"{RunFolder(recipe.out).model('export')}: transformers gives the student's logits, to {apart:.1e}")


def _search_task(path: Path, overrides: list[str] | None, out: Path | None, task: str) -> None:
    from ..errors import RecipeError
    from ..report import MetricsFile, Progress, fan_out
    from ..run import search_task

    number, _, count = task.partition("/")
    if not number.isdecimal() or not count.isdecimal():
        raise RecipeError(f"--task {task!r} is not of the form I/N. The first of six is 0/6.")
    recipe, topology = _begun(path, overrides, out)
    share = int(number), int(count)
    if topology.rank != 0:
        search_task(recipe, topology, *share)
        return
    with Progress() as progress:
        everyone = fan_out(raise_if_interrupted, progress, MetricsFile(RunFolder(recipe.out).metrics))
        print(search_task(recipe, topology, *share, listener=everyone))


def _print_report(out: Path) -> None:
    from ..records import read_summary
    from ..report import print_summary, report_run

    print_summary(read_summary(RunFolder(out).summary))
    print(f"report: {report_run(out)}")
    print(f"export: {RunFolder(out).model('export')}")


def _print_steps(path: Path, overrides: list[str] | None, out: Path | None) -> None:
    from ..parallel import launched
    from ..recipe import load_recipe
    from ..run import dry_run

    if launched("RANK", 0) != 0:
        return
    for step in dry_run(load_recipe(path, overrides or (), out)):
        print(f"{step.stage:<10} {step.state}{': ' + step.why if step.why else ''}")
