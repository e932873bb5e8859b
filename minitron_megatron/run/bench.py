"""Compare the serving throughput of teacher and student."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from ..convert import flat_config, read_config
from ..errors import DataError, FileError, RecipeError
from ..events import Event, Listener, silent
from ..files import MANIFEST, verify_checksums, whole_file, write_json
from ..forecast import WEIGHT_BYTES, untimed_candidates, with_model_folders
from ..model import ModelConfig
from ..recipe import Recipe
from ..run_folder import RunFolder
from ..serve import SERVERS, Measured, Server, Workload, measure_locally, write_requests

__all__ = ["Backend", "bench"]

Backend = Literal["trtllm", "vllm", "torch"]

Row = dict[str, Any]
"""Row of the table: `inputs`, `outputs`, `batch`, and the measurements of each model. `ratio` is the student's tokens
per second over the teacher's; `ratio_fp8` the FP8 student's over the bf16 teacher's. The row with the largest batch of
an (inputs, outputs) pair also has `ratio_batches` and `ratio_batches_fp8`: over the teacher at the smallest batch, as
the second paper compares."""
CANDIDATES = 5
"""Number of a search's candidates that are measured together with the teacher."""
RATIOS = {"ratio": "student", "ratio_fp8": "student fp8"}


def bench(recipe: Recipe, backend: Backend = "trtllm", *, listener: Listener = silent) -> list[Row]:
    """Measure every workload of `bench.ladder` and batch, write `bench/table.json` and return its rows. One process.

    If the server's benchmark is not installed, write the requests and `bench/BACKEND/commands.sh`, to be run in its
    container with this folder mounted, and return the reports of an earlier call, if any. With the torch backend, a
    recipe with
    a search may be measured before it has a student: then some candidates are measured with random weights, and the
    search fits the speed of the others to the table. Raises RecipeError if the student is not exported yet.
    """
    recipe = with_model_folders(recipe)
    models = _models(recipe, backend)
    folder, server = RunFolder(recipe.out).bench / backend, SERVERS.get(backend)
    rows, commands = [], []
    workloads = list(_workloads(recipe, min(read_config(each).max_positions for each in models.values())))
    for done, workload in enumerate(workloads, 1):
        measured: dict[str, Measured | None]
        if server is None:
            measured = dict(zip(models, measure_locally(list(models.values()), workload), strict=True))
        else:
            requests = folder / f"{workload.name}.jsonl"
            if not requests.exists():
                write_requests(requests, workload, read_config(models["teacher"]).shape.vocab, recipe.seed)
            calls = _calls(server, models, folder, requests, workload, recipe.bench.tp)
            commands += [shlex.join(call) for call, _ in calls.values()]
            measured = {name: _measured(server, workload, *call) for name, call in calls.items()}
        rows.append(_row(workload, measured))
        listener(Event("bench", done, len(workloads), "workloads"))
    _compare_batches(rows)
    if commands:
        with whole_file(folder / "commands.sh") as partial:
            partial.write_text("#!/bin/sh\nset -e\n" + "\n".join(commands) + "\n", encoding="utf-8")
    write_json(RunFolder(recipe.out).bench_table, {"backend": backend, "rows": rows, **_model_facts(models)})
    return rows


def _model_facts(models: Mapping[str, Path]) -> dict[str, object]:
    """Return the shapes and weight dtypes that a search needs to fit speeds to the rows."""
    configs = {name: read_config(path) for name, path in models.items()}
    return {
        "shapes": {name: asdict(config.shape) for name, config in configs.items()},
        "weight_bytes": {
            name: 1 if name.endswith("fp8") else WEIGHT_BYTES[_dtype(config)] for name, config in configs.items()
        },
    }


def _dtype(config: ModelConfig) -> str:
    return str(config.source.get("torch_dtype") or config.source.get("dtype") or "float32")


def _shapes(recipe: Recipe) -> dict[str, Path]:
    """Write folders with the configs of some candidates, from the largest to the smallest, without weights."""
    config = read_config(recipe.model)
    found = untimed_candidates(recipe, config.shape)
    last = max(1, min(CANDIDATES, len(found)) - 1)
    folders = {}
    for each in (found[at * (len(found) - 1) // last] for at in range(last + 1)):
        folders[each.name] = RunFolder(recipe.out).bench / "shapes" / each.name
        write_json(folders[each.name] / "config.json", flat_config(replace(config, shape=each.shape), _dtype(config)))
    return folders


def _models(recipe: Recipe, backend: Backend) -> dict[str, Path]:
    folders = RunFolder(recipe.out)
    models = {"teacher": recipe.model, "student": folders.model("export"), "student fp8": folders.model("export-fp8")}
    if not models["student"].is_dir():
        if recipe.search and backend == "torch":
            return {"teacher": recipe.model, **_shapes(recipe)}
        raise RecipeError(f"{models['student']} does not exist. Run `minitron run` first.")
    for name in ("student", "student fp8"):
        if (models[name] / MANIFEST).is_file():
            try:
                verify_checksums(models[name] / MANIFEST)
            except FileError as error:
                raise FileError(f"{error} Remove {models[name]}, and run `minitron export` again.") from error
    return {name: path for name, path in models.items() if path.is_dir()}


def _workloads(recipe: Recipe, context: int) -> Iterator[Workload]:
    """Yield the workloads that fit the models' context. Raises RecipeError if none does."""
    keys = recipe.bench
    fits = [(inputs, outputs) for inputs, outputs in keys.ladder if inputs + outputs <= context]
    if not fits:
        raise RecipeError(f"no entry of bench.ladder fits the context of {context} tokens. Give shorter ones.")
    for inputs, outputs in fits:
        for batch in keys.batches:
            yield Workload(inputs, outputs, batch, max(batch, keys.requests))


def _calls(
    server: Server, models: dict[str, Path], folder: Path, requests: Path, workload: Workload, tp: int
) -> dict[str, tuple[list[str], Path]]:
    """Return model -> (command, path of the report that it writes)."""
    calls = {}
    for name, model in models.items():
        report = folder / f"{workload.name}-{name.replace(' ', '-')}.json"
        calls[name] = server.command(model, requests, report, workload, tp=tp), report
    return calls


def _measured(server: Server, workload: Workload, call: list[str], report: Path) -> Measured | None:
    """Read a report, after running the benchmark if needed; None if it is not installed here."""
    if not report.exists():
        if not shutil.which(server.tool):
            return None
        # vLLM divides by the time that a progress bar tells, and this process has turned those off for itself
        environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
        done = subprocess.run(call, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            said = next((line for line in reversed(lines) if "Error" in line), " ".join(lines[-1:]))
            raise DataError(
                f"{server.tool} failed with exit code {done.returncode}: {said.rstrip('.')}. To see all that it says, "
                f"run: {shlex.join(call)}"
            )
    return server.parse_report(report, workload)


def _row(workload: Workload, measured: dict[str, Measured | None]) -> Row:
    row: Row = {"inputs": workload.inputs, "outputs": workload.outputs, "batch": workload.batch}
    row |= {name: asdict(found) if found else None for name, found in measured.items()}
    return row | {key: found for key, name in RATIOS.items() if (found := _ratio(row.get(name), row["teacher"]))}


def _compare_batches(rows: list[Row]) -> None:
    """Add the ratios between different batches, since a smaller model leaves memory for a larger batch."""
    rungs: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        rungs.setdefault((row["inputs"], row["outputs"]), []).append(row)
    for of_rung in rungs.values():
        first, last = (pick(of_rung, key=lambda row: row["batch"]) for pick in (min, max))
        if first is not last:
            found = {key: _ratio(last.get(name), first["teacher"]) for key, name in RATIOS.items()}
            last |= {key.replace("ratio", "ratio_batches"): value for key, value in found.items() if value}


def _ratio(student: Row | None, teacher: Row | None) -> float | None:
    """Return the ratio of tokens per second; None if either is unknown."""
    if not student or not teacher or not student["tokens_per_second"] or not teacher["tokens_per_second"]:
        return None
    return float(student["tokens_per_second"] / teacher["tokens_per_second"])
