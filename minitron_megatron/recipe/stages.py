"""The stages of a run, in order: what each one reads, and what it does."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..convert import Architecture, folder_hash, read_config
from ..data import check_tokenizer, prepare
from ..errors import TrainingError
from ..evaluate import ValidationSet
from ..events import Event
from ..files import checksum, read_as, write_json
from ..model import build, fill_initial
from ..parallel import broadcast_object, fail_together
from ..serve import quantize_fp8
from ..train import LMObjective
from .card import write_card
from .context import DTYPES, Context
from .fingerprint import carried_marks, config_digest, task_marks
from .pruning import cut, decide, measure, measure_depth
from .refitting import refitted, refitted_models, write_refit
from .results import Measured
from .searching import PARTS, decided, search_asks, search_shapes
from .sizes import depth_keys, rounds, scores_wanted
from .stage import Result, Stage
from .tasks import measured_row, write_table
from .training import correcting, distil, distillation_asks, train_in_phases

__all__ = ["STAGES"]


def do_prepare(context: Context) -> Result:
    """Text -> tokens, one corpus a source, on rank 0; says who the teacher is."""
    recipe, result = context.recipe, None
    with fail_together():
        if context.topology.rank == 0:
            vocab = read_config(recipe.model).shape.vocab
            check_tokenizer(recipe.model, vocab)
            drawn: Result = {"sequence": recipe.data.sequence, "seed": recipe.seed}  # what every later draw depends on
            drawn |= {"cross_documents": recipe.data.cross_documents, "config": config_digest(recipe.model)}
            result = {"model_hash": folder_hash(recipe.model), "sources": _prepare_sources(context, vocab), **drawn}
    return broadcast_object(result)


def _prepare_sources(context: Context, vocab: int) -> Result:
    data, sources = context.recipe.data, {}
    for number, source in enumerate(data.sources):
        name = f"{number}-{source.path.stem}"
        held_out = source.validation if isinstance(source.validation, float) else [source.validation]
        made = prepare(
            [source.path],
            context.recipe.model,
            context.folders.data / name,
            validation=held_out,
            workers=data.workers,
            text_key=data.text_key,
            separator=data.separator,
            seed=context.recipe.seed,
            vocab=vocab,
            listener=context.listener,
        )
        validation_tokens = made.valid.tokens if made.valid else 0
        tokens = {"tokens": made.train.tokens, "validation_tokens": validation_tokens}
        sources[name] = {**tokens, "end": made.end, "content": made.content, "weight": source.weight}
    return sources


def do_correct(context: Context) -> Result:
    """Fine-tunes the teacher with cross-entropy on the distillation data."""
    keys = context.recipe.correct
    assert keys is not None
    model = context.load(context.recipe.model, trains=True)
    with correcting(context, model):
        tokens = train_in_phases(context, model, LMObjective(context.topology), keys, "correct")
    return {**_saved(context, model, context.folders.corrected), "tokens": tokens}


def _saved(
    context: Context,
    model: list[Any],
    folder: Path,
    dtype: torch.dtype | None = None,
    architecture: Architecture = "own",
) -> Result:
    """Writes a model; returns its hash, and the checksum of the list of its files'. Collective over the world."""
    return {"hash": context.save(model, folder, dtype, architecture), "files": context.sealed(folder)}


def do_score(context: Context) -> Result:
    """Importance of every axis that the recipe may cut."""
    keys, folders = context.recipe.score, context.folders
    model, batches = context.load_uncut(DTYPES[keys.dtype]), context.calibration_batches()
    scores = measure(context, model, batches, context.uncut_hash)
    depth = measure_depth(context, model, batches)
    files: dict[str, str] = {}
    if context.topology.rank == 0:
        scores.save(folders.scores)
        folders.depth.unlink(missing_ok=True)
        if depth is not None:
            depth.save(folders.depth)
        files = {path.name: checksum(path) for path in (folders.scores, folders.depth) if path.exists()}
    result = {"samples": scores.samples, "tokens": scores.tokens, "statistic": keys.statistic.model_dump()}
    return result | {"depth": depth.metric if depth else None, "files": broadcast_object(files)}


def do_search(context: Context) -> Result:
    """Finds the shape, where the recipe has it found."""
    return search_shapes(context)


def do_prune(context: Context) -> Result:
    """Chooses what stays, cuts the teacher to it, and repairs what is left where the recipe asks for it."""
    plan = decide(context)
    model = cut(context, plan)
    fits = refitted(context, model, plan)
    folder = context.folders.model("pruned")
    digest = context.save(model, folder)
    with fail_together():
        if context.topology.rank == 0:
            plan.save(context.folders.plan)
    repair = write_refit(context, fits)
    return {
        "hash": digest,
        "files": context.sealed(folder),
        **repair,
        "margins": {axis: min(by.values()) for axis, by in plan.margins.items()},
        "by": context.recipe.prune.by,
        "layers": list(plan.kept_layers),
        "rounds": rounds(context.recipe, plan.shape),
    }


def do_distill(context: Context) -> Result:
    """Distils the teacher into the pruned student."""
    student = context.load(context.recipe.distill.start or context.folders.model("pruned"), trains=True)
    return _distill(context, student, "distilled")


def do_baseline(context: Context) -> Result:
    """Distils the teacher into a random student of the same shape, on the same tokens."""
    context.expect_unchanged(context.folders.model("pruned"))
    config = read_config(context.folders.model("pruned"))
    recipe = context.recipe
    student = build(config, context.topology, context.dtype, recompute=recipe.recompute, spec=recipe.spec)
    fill_initial(student, context.topology, context.recipe.seed)
    return _distill(context, student, "random")


def _distill(context: Context, student: list[Any], name: str) -> Result:
    tokens = distil(context, student, "distill" if name == "distilled" else "baseline")
    return {**_saved(context, student, context.folders.model(name)), "tokens": tokens}


def do_evaluate(context: Context) -> Result:
    """Loss of every model of the run on the held-out text."""
    held_out = context.held_out()
    models: dict[str, tuple[Path, str]] = {"teacher": (context.recipe.model, "")}
    if context.recipe.corrects_first:
        models["corrected teacher"] = (context.folders.corrected, "correct")
    models |= {name: (context.folders.model(folder), "prune") for name, folder in refitted_models(context).items()}
    models["distilled"] = (context.folders.model("distilled"), "distill")
    if context.recipe.random_baseline:
        models["random init"] = (context.folders.model("random"), "baseline")
    rows = []
    for number, (name, (folder, stage)) in enumerate(models.items(), 1):
        row = _row(context, name, folder, held_out)
        loss = {f"loss/{name}": row["loss_nats_per_token"]}
        context.listener(Event("evaluate", number, len(models), "models", loss))
        done = context.done.get(stage, {})
        rows.append(row | {"tokens": done.get("tokens", 0), "seconds": done.get("seconds", 0.0)})
    if context.topology.rank == 0:
        write_json(context.folders.summary, rows)
        write_table(rows, context.folders.evaluation / "table.md")
        shutil.rmtree(context.folders.evaluation / PARTS, ignore_errors=True)
    return {"loss": {row["model"]: row["loss_nats_per_token"] for row in rows}}


def _row(context: Context, name: str, folder: Path, held_out: ValidationSet) -> dict[str, Any]:
    """A model's row of the summary; one that a stopped run has measured is not measured again."""
    path = context.folders.evaluation / PARTS / context.mark_of(context.recipe)[:16] / f"{name.replace(' ', '_')}.json"
    with fail_together():
        kept = read_as(path, Measured) if path.is_file() and context.topology.rank == 0 else None
    if kept := broadcast_object(kept):
        return dict(kept)
    row = measured_row(context, name, folder, held_out)
    if not math.isfinite(row["loss_nats_per_token"]):
        raise TrainingError(
            f"{folder} has a loss of {row['loss_nats_per_token']} on the held-out text. It is no result."
        )
    if context.topology.rank == 0:
        write_json(path, row)
    return row


def do_export(context: Context) -> Result:
    """Writes the student as the Hugging Face folder that is served."""
    dtype = DTYPES[context.recipe.export.dtype]
    model = context.load(context.folders.model("distilled"))
    folder = context.folders.model("export")
    saved = _saved(context, model, folder, dtype, context.recipe.export.architecture)
    write_card(context, folder)  # after the checksums: whoever serves the model may edit it
    if context.recipe.export.quantize == "fp8":
        _quantize(context, folder)
    return {**saved, "dtype": context.recipe.export.dtype}


def _quantize(context: Context, folder: Path) -> None:
    """`export-fp8` beside the export, on the first rank."""
    keys = context.recipe.export
    corpus = context.calibration()
    samples = [corpus[number][0][None] for number in range(min(keys.quantize_samples, len(corpus)))]
    with fail_together():
        if context.topology.rank == 0:
            quantize_fp8(folder, context.folders.model("export-fp8"), samples, kv_cache=keys.kv_cache_fp8)
    context.sealed(context.folders.model("export-fp8"))


DATA = ("model", "data", "seed")
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("prepare", do_prepare, "data", DATA),
        Stage(
            "correct",
            do_correct,
            "corrected",
            ("correct", "dtype"),
            ("prepare",),
            lambda recipe: recipe.corrects_first,
        ),
        Stage("score", do_score, "scores", ("score",), ("prepare", "correct"), scores_wanted, depth_keys),
        Stage(
            "search",
            do_search,
            "search/table.json",
            ("search",),
            ("prepare", "correct", "score"),
            lambda recipe: recipe.search is not None,
            search_asks,
            decided,
            keeps=f"search/{PARTS}",
        ),
        Stage("prune", do_prune, "pruned", ("prune", "dtype"), ("prepare", "correct", "score")),
        Stage(
            "distill",
            do_distill,
            "distilled",
            ("distill", "dtype"),
            ("prepare", "correct", "prune"),
            asks=distillation_asks,
        ),
        Stage(
            "baseline",
            do_baseline,
            "random",
            ("distill", "dtype"),
            ("prepare", "correct", "prune"),
            lambda recipe: recipe.random_baseline,
            distillation_asks,
        ),
        Stage(
            "evaluate",
            do_evaluate,
            "summary.json",
            ("evaluate", "dtype"),
            ("prepare", "correct", "prune", "distill", "baseline"),
            asks=lambda recipe: task_marks(recipe) if recipe.evaluate.wanted() else None,
            keeps=f"evaluation/{PARTS}/{{mark}}",
        ),
        Stage(
            "export",
            do_export,
            "export",
            ("export",),
            ("prepare", "distill", "evaluate"),
            asks=lambda recipe: carried_marks(recipe.model),
        ),
    )
}
