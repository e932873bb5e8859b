"""Check a recipe before work begins.

`run`, `--dry-run` and `estimate` all call `check`. `check_corpus` follows once the corpus is tokenized and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import psutil
from typing_extensions import TypedDict

from .. import numbers
from ..align import REWARDS, AnswerSettings
from ..convert import check_weights, read_config
from ..data import (
    HUB,
    chat_marks,
    check_same_tokenizer,
    check_tokenizer,
    most_bytes,
    read_prompts,
    samples_by_source,
)
from ..errors import DataError, PlanError, RecipeError, did_you_mean
from ..layout import Shape
from ..model import ModelConfig, check_fits, check_spec, is_megatron_checkpoint
from ..parallel import PlannedTopology, Topology, check_independent_replicas
from ..recipe import (
    CHOOSE_BY,
    AlignRound,
    CalibrationSource,
    Recipe,
    ResolvedPhase,
    SftRound,
    light_recipe,
    resolved,
    steps_of,
    with_keys_in_errors,
)
from ..serve import check_fp8
from .check_files import check_files
from .check_tasks import check_evaluation
from .check_training import check_micro_batches, check_schedule, check_sequence
from .model_folders import with_model_folders
from .sizes import check_pruning

__all__ = [
    "check",
    "check_calibration",
    "check_corpus",
    "check_held_out",
    "needed_calibration",
    "needed_tokens",
    "planned",
]

Demand = tuple[str, int, int, list[float], bool]
"""Key, samples, tokens per sample, weight of each source, and whether text may repeat."""
INDEX_BYTES = 30
"""Host memory per sample of a phase: its source, its position, and megatron-core's document and sample indices."""


@with_keys_in_errors("parallel")
def planned(recipe: Recipe, processes: int | None = None) -> PlannedTopology:
    """Return the recipe's layout over this many processes, by default the fewest that it needs.

    Raises TopologyError if the number of processes does not fit the layout.
    """
    keys = recipe.parallel
    processes = processes or keys.pp * math.lcm(keys.tp * keys.cp, keys.ep)
    topology = PlannedTopology(**keys.model_dump(), processes=processes)
    topology.check(processes)
    return topology


@with_keys_in_errors()
def check(recipe: Recipe, topology: Topology, *, counts_only: bool = False) -> Recipe:
    """Return the recipe with a Hugging Face folder for each model, as `with_model_folders` does. Not collective.

    Raises a MinitronError for the first problem that a run of this recipe would meet.

    topology: the layout of running or planned processes. counts_only: the recipe will not run on this machine, so that
    weights and Transformer Engine are not required.
    """
    if recipe.family:
        raise RecipeError(
            "The recipe lists a family of students, which only a whole run makes. For one of them use the recipe.yaml "
            "in its folder."
        )
    if not counts_only:
        check_spec(recipe.spec)
    places, recipe = recipe, with_model_folders(recipe)
    config = _check_inputs(recipe, places, counts_only=counts_only)
    check_fits(config.shape, topology)
    student = check_pruning(recipe, config.shape, topology).student
    if recipe.export.quantize == "fp8":
        _check_fp8(student)
    recipe.distill.loss.check(min(config.shape.vocab, student.vocab))
    _check_search(recipe)
    if not counts_only:
        _check_start(recipe, student)
    _check_samples_and_steps(recipe, config, topology)
    _check_lora(recipe, config.shape)
    _check_text_is_enough(recipe)
    check_evaluation(recipe, counts_only=counts_only)
    return recipe


def _check_inputs(recipe: Recipe, places: Recipe, *, counts_only: bool) -> ModelConfig:
    """Check the models and the text, and return the teacher's config. places: the recipe with the user's names of
    models."""
    config = read_config(recipe.model)
    if not counts_only and recipe.model == places.model:
        check_weights(recipe.model)
    if not counts_only or any(recipe.model.glob("tokenizer*")):
        given = places.tokenizer if is_megatron_checkpoint(places.model) else None
        check_tokenizer(given or recipe.model, config.shape.vocab)
        if recipe.align or any(source.chat for source in (*recipe.data.sources, *recipe.score.sources)):
            chat_marks(recipe.model)
    check_files(places, must_be_writable=not counts_only)
    if recipe.student:
        _check_student(recipe, config.shape, weights=not counts_only and recipe.student == places.student)
    return config


def _check_samples_and_steps(recipe: Recipe, config: ModelConfig, topology: Topology) -> None:
    """Check the samples of each stage against the layout and the models, and the steps of each training."""
    phases = list(_training(recipe))
    for key, phase in phases:
        _check_samples(key, phase, recipe, topology)
    for key, phase in phases:
        check_schedule(key, phase.keys, phase.steps)
        _check_index(key, phase)
    for number, keys in enumerate(recipe.align):
        _check_round(f"align.{number}", keys, recipe, topology)
    for each in (config, *([read_config(recipe.student)] if recipe.student else [])):
        _check_lengths(recipe, each, phases)
    if recipe.search and recipe.search.light and recipe.search.light.independent_replicas:
        check_independent_replicas(topology)
    batch = recipe.score.micro_batch
    check_micro_batches("score.samples", recipe.score.samples, batch, topology, topology.dp)
    if recipe.prune.refit != "none":
        check_micro_batches("prune.refit_samples", recipe.prune.refit_samples, batch, topology, topology.dp)


class TokenCount(TypedDict):
    """Tokens of a tokenized source."""

    tokens: int


class SourceTokens(TokenCount):
    """Tokens of a prepared source, and its held-out ones."""

    validation_tokens: int


def check_corpus(recipe: Recipe, sources: Mapping[str, SourceTokens]) -> None:
    """Raise DataError if a prepared source has too few tokens for a stage that draws from it.

    sources: the result of `prepare` for each source, in the recipe's order.
    """
    check_held_out(sources, recipe.data.sequence)
    _check_demands(_sample_demands(recipe), sources)


def check_held_out(sources: Mapping[str, SourceTokens], sequence: int, block: str = "data") -> None:
    """Raise DataError if a source's held-out text is less than one sample. block: where the keys of the sources lie."""
    for name, source in sources.items():
        held = int(source["validation_tokens"])
        if held <= sequence:
            raise DataError(
                f"the held-out text of {name} has {held:,} tokens, less than one sample of {sequence:,}. Hold out more "
                f"({block}.sources[].validation), or set a shorter {block}.sequence."
            )


def check_calibration(recipe: Recipe, sources: Mapping[str, TokenCount]) -> None:
    """Raise DataError if a tokenized source of `score.sources` has too few tokens for the calibration samples."""
    _check_demands(_calibration_demands(recipe), sources)


def _check_demands(demands: Iterable[Demand], sources: Mapping[str, TokenCount]) -> None:
    for key, samples, length, weights, repeat in demands:
        counts = samples_by_source(weights, samples)
        for (name, source), count in zip(sources.items(), counts, strict=True):
            there = source["tokens"]
            held = (there - 1) // length
            if held < (1 if repeat else count):
                raise DataError(
                    f"{key} needs {count:,} samples of {length:,} tokens from {name}, but it has only {held:,} "
                    f"({there:,} tokens). Lower {key} or the weight of this source, or set data.repeat to true."
                )


def needed_tokens(recipe: Recipe) -> list[dict[str, int]] | None:
    """Return the tokens of each source's splits that all stages together draw; None where all text is tokenized."""
    if recipe.data.tokenize == "all":
        return None
    valid = recipe.evaluate.samples * recipe.data.sequence + 1
    return [{"train": tokens, "valid": valid} for tokens in _needed(_sample_demands(recipe), len(recipe.data.sources))]


def needed_calibration(recipe: Recipe) -> list[dict[str, int]] | None:
    """Return the same of `score.sources`, which have no held-out text."""
    if recipe.data.tokenize == "all":
        return None
    return [{"train": tokens} for tokens in _needed(_calibration_demands(recipe), len(recipe.score.sources))]


def _needed(demands: Iterable[Demand], sources: int) -> list[int]:
    """Return the tokens of each source that all demands together draw."""
    needed = [1] * sources
    for _, samples, length, weights, _ in demands:
        for number, count in enumerate(samples_by_source(weights, samples)):
            needed[number] += count * length
    return needed


def _sample_demands(recipe: Recipe) -> Iterator[Demand]:
    """Yield the demand of each user of the training text."""
    for key, phase in _training(recipe):
        yield f"{key}.tokens", phase.samples, phase.sequence, list(phase.weights), recipe.data.repeat
    if not recipe.score.sources:
        yield from _calibration_demands(recipe)


def _calibration_demands(recipe: Recipe) -> Iterator[Demand]:
    """Yield the demand of each user of the calibration text."""
    weights = [source.weight for source in recipe.score.sources or recipe.data.sources]
    yield "score.samples", recipe.score.samples, recipe.data.sequence, weights, False
    if recipe.prune.refit != "none":
        yield "prune.refit_samples", recipe.prune.refit_samples, recipe.data.sequence, weights, False


def _training(recipe: Recipe) -> Iterator[tuple[str, ResolvedPhase]]:
    """Yield (key in the recipe, phase) of every training phase."""
    if recipe.correct and recipe.corrects_first:
        yield "correct", resolved(recipe.correct, recipe.data)[0]
    for number, phase in enumerate(resolved(recipe.distill, recipe.data)):
        yield f"distill.phases.{number - 1}" if number else "distill", phase
        if recipe.correct and recipe.correct.continuous:
            keys = recipe.correct.replaced(tokens=phase.keys.tokens, global_batch=phase.keys.global_batch)
            yield "correct", ResolvedPhase(keys, phase.sequence, phase.weights)
    if recipe.search and recipe.search.light:
        yield "search.light", resolved(light_recipe(recipe).distill, recipe.data)[0]


def _check_samples(key: str, phase: ResolvedPhase, recipe: Recipe, topology: Topology) -> None:
    alone = key == "search.light" and recipe.search and recipe.search.light and recipe.search.light.independent_replicas
    replicas = 1 if alone else topology.replicas
    check_micro_batches(f"{key}.global_batch", phase.keys.global_batch, phase.keys.micro_batch, topology, replicas)
    if len(phase.weights) != len(recipe.data.sources):
        raise RecipeError(
            f"{key}.weights has {numbers.counted(len(phase.weights), 'entry', 'entries')}, but "
            f"data.sources has {len(recipe.data.sources)}. "
            "Give one weight per source."
        )
    where = "data.sequence" if phase.sequence == recipe.data.sequence else f"{key}.sequence"
    check_sequence(where, phase.sequence, topology)


def _check_index(key: str, phase: ResolvedPhase) -> None:
    needed, there = phase.samples * INDEX_BYTES, psutil.virtual_memory().total
    if needed > there:
        raise RecipeError(
            f"{key}.tokens means {phase.samples:.3g} samples, whose index alone takes "
            f"{needed / 2**30:.3g} GiB, but this machine has {there / 2**30:.3g} GiB. Lower {key}.tokens."
        )


def _check_round(key: str, keys: AlignRound, recipe: Recipe, topology: Topology) -> None:
    """Check a round of alignment: its schedule, batches and length, and what it samples."""
    sequence = keys.sequence or recipe.data.sequence
    tokens = keys.tokens if isinstance(keys, SftRound) else None
    check_schedule(key, keys, steps_of(tokens, keys.global_batch, sequence) if tokens else None)
    check_micro_batches(f"{key}.global_batch", keys.global_batch, keys.micro_batch, topology, topology.replicas)
    if isinstance(keys, SftRound):
        check_sequence(f"{key}.sequence", sequence, topology)
    elif keys.sample:
        _check_sampling(keys.sample, run_code=recipe.evaluate.run_code)


def _check_sampling(keys: AnswerSettings, *, run_code: bool) -> None:
    """Check the reward, and the records that are on this machine."""
    here = not any(path.startswith(HUB) for path in keys.paths)
    prompts = list(read_prompts(keys.paths, rated=not keys.samples, limit=keys.limit)) if here else []
    if keys.reward in REWARDS:
        REWARDS[keys.reward].check(keys.reward, prompts, run_code)


def _check_lengths(recipe: Recipe, config: ModelConfig, phases: Iterable[tuple[str, ResolvedPhase]]) -> None:
    """Check that no sample is longer than the model's context."""
    lengths = {"data.sequence": recipe.data.sequence}
    lengths |= {f"{key}.sequence": phase.sequence for key, phase in phases if key.startswith("distill.phases")}
    lengths |= {f"align.{number}.sequence": keys.sequence for number, keys in enumerate(recipe.align) if keys.sequence}
    for key, length in lengths.items():
        if length > config.longest and not recipe.data.beyond_positions:
            what = "max_position_embeddings" if config.longest == config.max_positions else "sliding_window"
            raise RecipeError(
                f"{key} is {length}, but the model has a {what} of {config.longest}. "
                f"Set {key} to {config.longest} or less, or data.beyond_positions to true."
            )


def _check_student(recipe: Recipe, teacher: Shape, *, weights: bool) -> None:
    """Check a student that is not cut from the teacher. weights: check its weights too."""
    assert recipe.student is not None
    vocab = read_config(recipe.student).shape.vocab
    if weights:
        check_weights(recipe.student)
    if any(recipe.model.glob("tokenizer*")) and any(recipe.student.glob("tokenizer*")):
        entries = check_same_tokenizer(recipe.model, recipe.student)
        if vocab != teacher.vocab and min(vocab, teacher.vocab) < entries:
            raise RecipeError(
                f"the teacher has {teacher.vocab} vocabulary entries and the student {vocab}, but their tokenizer has "
                f"{entries}: they differ in more than padding. Give a student whose vocabulary holds the tokenizer."
            )
    elif weights:
        lacks = recipe.student if any(recipe.model.glob("tokenizer*")) else recipe.model
        raise RecipeError(
            f"{lacks} has no tokenizer, so that the teacher's and the student's cannot be compared. Put it there."
        )


def _check_fp8(student: Shape) -> None:
    try:
        check_fp8(student)
    except PlanError as error:
        raise PlanError(f"export.quantize: {error}") from error


def _check_start(recipe: Recipe, student: Shape) -> None:
    start = recipe.distill.start
    if start is None:
        return
    check_weights(start)
    if unlike := read_config(start).shape.differences(student):
        raise RecipeError(
            f"distill.start is {start}, which does not have the student's shape: {unlike}. "
            "Give another folder, or change prune."
        )


def _check_search(recipe: Recipe) -> None:
    keys = recipe.search
    if keys is None:
        return
    known = [*CHOOSE_BY, *(task.name for task in recipe.evaluate.wanted())]
    if keys.choose not in known:
        raise RecipeError(
            f"search.choose {keys.choose!r} is unknown.{did_you_mean(keys.choose, known)} Use "
            f"{' or '.join(known)}; tasks must be listed under evaluate."
        )


def _check_lora(recipe: Recipe, teacher: Shape) -> None:
    correct = recipe.correct
    if correct and correct.parameters == "lora" and correct.lora_rank > teacher.hidden:
        raise RecipeError(
            f"correct.lora_rank is {correct.lora_rank}, but no matrix has a rank above {teacher.hidden}. Lower it."
        )


def _check_text_is_enough(recipe: Recipe) -> None:
    """Refuse a source that is too small even at one byte per token, before anything is tokenized."""
    most = [_most_tokens(source, source.paths) for source in recipe.data.sources]
    for source, size in zip(recipe.data.sources, most, strict=True):
        text = _most_tokens(source, source.held_out_paths) if source.held_out_paths else size
        if text <= recipe.data.sequence:
            raise DataError(
                f"the held-out text of {source.name} has {text:,} bytes, less than one sample of "
                f"{recipe.data.sequence:,} tokens. Hold out more, or set a shorter data.sequence."
            )
    _check_bytes(recipe.data.sources, most, _sample_demands(recipe))
    if own := recipe.score.sources:
        _check_bytes(own, [_most_tokens(source, source.paths) for source in own], _calibration_demands(recipe))


def _most_tokens(source: CalibrationSource, places: Sequence[str]) -> float:
    """Return an upper limit of a source's tokens: its bytes, but for chats, to which the template may add any text."""
    return math.inf if source.chat else most_bytes(places)


def _check_bytes(sources: Sequence[CalibrationSource], most: Sequence[float], demands: Iterable[Demand]) -> None:
    for key, samples, length, weights, repeat in demands:
        for source, size, weight in zip(sources, most, weights, strict=True):
            needed = int(length * (1 if repeat else samples * weight / sum(weights)))
            if size < needed:
                raise DataError(
                    f"{key} needs {needed:,} tokens from {source.name}, but it has only {size:,} bytes. Lower {key} or "
                    "the weight of this source, or set data.repeat to true."
                )
