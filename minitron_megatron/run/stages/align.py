"""Align the student: rounds of fine-tuning on chats and of preference optimisation, each a stage."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...align import (
    AnswerSettings,
    PairBatch,
    PairFile,
    PairsSummary,
    PreferenceObjective,
    Reference,
    held_out_pairs,
    load_reference,
    make_pairs,
    measure_reference,
    pair_order,
    save_arrays,
    step_pairs,
    tokenize_pairs,
)
from ...data import chat_marks, places, preference_pairs
from ...files import file_marks, read_as, write_json
from ...forecast import check_held_out, check_schedule
from ...model import Chunk, evaluating, field_of
from ...parallel import broadcast_object, fail_together
from ...recipe import Distill, PairRound, Recipe, SftRound
from ...train import Saving, Training, TrainingSettings, mean_loss, train
from ..context import Context
from ..stage import Model, Result, Stage
from ..training import distil
from .prepare import Source, tokenized

__all__ = ["round_stage"]

PAIRS, SUMMARY = "pairs.jsonl", "sampled.json"
"""Pairs of a round that samples them, which stay in the run folder, and what they were chosen from."""


class Aligned(Model):
    """Result of a round."""

    method: str
    units: int
    """Tokens of a fine-tuning, pairs of a preference optimisation."""
    sampled: PairsSummary | None
    """Answers that the pairs were chosen from, where the round samples them."""


def do_round(number: int, context: Context) -> Result:
    """Align the student of the round before. The data of the round is kept until it is done."""
    keys = context.recipe.align[number - 1]
    work = context.folders.alignment(number) / context.mark_of(context.recipe)[:16]
    student = context.load(context.aligned(number - 1), trains=True)
    if isinstance(keys, SftRound):
        units = _fine_tune(context, number, keys, student, work)
    else:
        units = _prefer(context, number, keys, student, work)
    saved = context.save_sealed(student, context.aligned(number))
    sampled = None
    with fail_together():
        if context.topology.rank == 0:
            if (work / SUMMARY).is_file():
                sampled = read_as(work / SUMMARY, PairsSummary)
                (work / PAIRS).replace(work.parent / PAIRS)
            shutil.rmtree(work)
    return {**saved, "method": keys.method, "units": units, "sampled": broadcast_object(sampled)}


def _fine_tune(context: Context, number: int, keys: SftRound, student: list[Chunk], work: Path) -> int:
    """Train on chats, as a distillation with its own data does; return the tokens seen."""
    sources = _chats(context, keys, work)
    recipe = context.recipe
    sequence = keys.sequence or recipe.data.sequence
    tokens = keys.tokens or round(keys.epochs * sum(source["tokens"] for source in sources.values()))
    objective: dict[str, Any] = {"objective": "cross_entropy"} if keys.loss == "ce" else {"loss": keys.kd}
    shared = {name: getattr(keys, name) for name in ("micro_batch", "global_batch", *TrainingSettings.model_fields)}
    inner = recipe.replaced(
        data=recipe.data.replaced(sources=keys.sources, sequence=sequence, repeat=True, cross_documents=False),
        distill=Distill(tokens=tokens, **shared, **objective),
        correct=recipe.correct if recipe.corrects_first else None,
        align=(),
    )
    check_held_out(sources, sequence, f"align.{number - 1}")
    check_schedule(f"align.{number - 1}", keys, inner.distill.steps(sequence), "epochs")
    done = {**context.done, "prepare": context.done["prepare"] | {"sources": sources}}
    mark = context.mark_of(recipe)
    context = replace(context, recipe=inner, done=done, corpora=work, mark_of=lambda _: mark)
    return distil(context, student, f"align-{number}")


def _chats(context: Context, keys: SftRound, work: Path) -> dict[str, Source]:
    """Tokenize the sources of a round, unless an interrupted run has; return what each holds. Collective."""
    made, record = dict[str, Source](), work / "sources.json"
    with fail_together():
        if context.topology.rank == 0 and record.is_file():
            made = read_as(record, dict[str, Source])
        elif context.topology.rank == 0:
            for number, source in enumerate(keys.sources):
                prefix, held_out = work / f"{number}-{source.name}", source.held_out_paths or float(source.validation)
                made[prefix.name] = tokenized(context, source, prefix, validation=held_out, enough=None)
            write_json(record, made)
    return dict(broadcast_object(made))


def _prefer(context: Context, number: int, keys: PairRound, student: list[Chunk], work: Path) -> int:
    """Train on preference pairs; return their number, with repetitions."""
    topology = context.topology
    file = _pairs(context, keys, student, work)
    reference = _reference(context, keys, student, file, work)
    used, held_out = file.split(held_out=False), file.split(held_out=True)[: context.recipe.evaluate.samples]
    steps = -(-max(1, round(keys.epochs * len(used))) // keys.global_batch)
    check_schedule(f"align.{number - 1}", keys, steps, "epochs")
    order = pair_order(used, steps * keys.global_batch, context.recipe.seed)

    def batches(step: int) -> list[PairBatch]:
        chosen = order[step * keys.global_batch :][: keys.global_batch]
        return list(step_pairs(file, reference, chosen, keys.micro_batch, topology))

    validation = held_out_pairs(file, reference, held_out, keys.micro_batch, topology) if len(held_out) else []

    def validate() -> dict[str, float]:
        objective = PreferenceObjective(topology, keys.pair_loss)
        with evaluating(student):
            loss, _ = mean_loss(student, validation, objective, topology)
        measured = {f"validation_{name}": value for name, value in objective.finish().items()}
        return {"validation_loss": loss, **measured}

    values = train(
        student,
        PreferenceObjective(topology, keys.pair_loss),
        batches,
        Training.of(keys, steps, context.recipe.seed),
        topology,
        label=f"align-{number}",
        saving=Saving(*context.phase_checkpoints[-1]),
        validate=validate if len(held_out) else None,
        listener=context.listener,
    )
    return int(values["pairs"])


def _pairs(context: Context, keys: PairRound, student: list[Chunk], work: Path) -> PairFile:
    """Return the round's pairs as tokens, made and written unless an interrupted run has. Collective."""
    path, tokenizer = work / "pairs.safetensors", context.recipe.model
    paths = [_sampled(context, keys.sample, student, work)] if keys.sample else keys.paths
    with fail_together():
        if context.topology.rank == 0 and not path.is_file():
            held = keys.held_out_paths
            cut = tokenize_pairs(
                preference_pairs(paths, tokenizer),
                path,
                sequence=keys.sequence or context.recipe.data.sequence,
                vocab=field_of(student[0], "vocab"),
                rewarded=keys.method == "rpo",
                held_out=preference_pairs(held, tokenizer) if held else float(keys.validation),
                seed=context.recipe.seed,
            )
            if cut:
                warnings.warn(f"Pairs with a response that is cut off at the end of the sample: {cut:,}.", stacklevel=2)
    with fail_together():
        return PairFile(path)


def _sampled(context: Context, settings: AnswerSettings, student: list[Chunk], work: Path) -> str:
    """Return the file of the pairs that the student's answers give, made unless an interrupted run has. Collective."""
    path, recipe = work / PAIRS, context.recipe
    if not broadcast_object((work / SUMMARY).is_file()):  # which is written last
        made = make_pairs(
            student,
            context.topology,
            settings,
            recipe.model,
            path,
            work / "answers",
            seed=recipe.seed,
            run_code=recipe.evaluate.run_code,
            listener=context.listener,
        )
        if context.topology.rank == 0:
            write_json(work / SUMMARY, made)
    return str(path)


def _reference(context: Context, keys: PairRound, student: list[Chunk], file: PairFile, work: Path) -> Reference:
    """Return the likelihoods of all responses under the student, measured unless an interrupted run has. Collective."""
    path = work / "reference.safetensors"
    if not broadcast_object(path.is_file()):
        listener, size = context.listener, keys.micro_batch
        reference = measure_reference(student, file, context.topology, micro_batch=size, listener=listener)
        with fail_together():
            if context.topology.rank == 0:
                save_arrays(path, reference=reference)
    with fail_together():
        return load_reference(path, len(file))


def _inputs(number: int, recipe: Recipe) -> list[object]:
    """Return a round's keys, and marks of its files and of the chat template."""
    keys = recipe.align[number - 1]
    models = [keys.sample.reward_model] if isinstance(keys, PairRound) and keys.sample else []
    read = [*places([*keys.paths, *keys.held_out_paths]), *(model for model in models if model)]
    return [keys.deciding(), file_marks(read), chat_marks(recipe.model)]


def round_stage(number: int) -> Stage:
    """Return the stage of a round, counted from 1."""
    return Stage(
        f"align-{number}",
        partial(do_round, number),
        result=Aligned,
        makes=lambda run: run.model(f"aligned-{number}"),
        reads=("dtype",),
        after=("prepare", "correct", "distill" if number == 1 else f"align-{number - 1}"),
        extra_inputs=partial(_inputs, number),
        keeps=lambda run, mark: run.alignment(number) / mark[:16],
    )
