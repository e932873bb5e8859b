"""Stages of a run on a rehearsed rank: the run's own code, with models that have no weights and text that is random."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

from ..convert import full_tensors, read_config
from ..errors import RecipeError
from ..evaluate import MOST_TOKENS, Predictor
from ..events import silent
from ..forecast import candidates_of
from ..model import evaluating
from ..parallel import Topology
from ..prune import random_plan
from ..recipe import Recipe, resolved
from ..run import DTYPES, STAGES
from ..search import zero_shot
from .context import Rehearsed, RehearsedContext
from .ledger import Ledger

__all__ = ["COVERED", "TRAINS", "Rehearsed", "rehearsable", "run_stage"]

TRAINS = ("correct", "distill")
COVERED = ("correct", "score", "search", "prune", "distill", "evaluate", "generate", "export")
"""Stages that can be rehearsed, and `generate`, which tasks of `evaluate` do. Of `evaluate` the losses on held-out
text, of `score` not the layers' importance by tasks, of `prune` the cut and the refit: units by chance, in one round,
no merged heads; of `search` the losses right after the cut, without the refit that `prune` has and the training that
`distill` has. Nothing is written."""
SAVES_NEVER = 10**9


def rehearsable(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe of a short run of one stage, in one phase: the one with the most tokens in a micro-batch.

    Raises RecipeError for a stage that is not covered or that the recipe does not have.
    """
    if stage not in COVERED:
        raise RecipeError(f"the stage {stage!r} cannot be rehearsed. Give --stage {', '.join(COVERED[:-1])} or export.")
    if stage in STAGES and not STAGES[stage].wanted(recipe):
        raise RecipeError(f"this recipe does not use the stage {stage}. Give another --stage.")
    if stage == "prune":
        return _without_scores(recipe)
    if stage not in TRAINS:
        return recipe.replaced(evaluate=recipe.evaluate.replaced(suite=None, tasks=()))
    keys = recipe.correct if stage == "correct" else recipe.distill
    assert keys is not None
    phase = max(resolved(keys, recipe.data), key=lambda each: each.keys.micro_batch * each.sequence)
    never = {"save_every": SAVES_NEVER, "validate_every": SAVES_NEVER}
    short = phase.keys.replaced(**never, **({"phases": (), "retain": False} if stage == "distill" else {}))
    return recipe.replaced(**{stage: short}, data=recipe.data.replaced(sequence=phase.sequence))


def _without_scores(recipe: Recipe) -> Recipe:
    """Return a recipe whose cut has the same sizes and needs no scores."""
    keys = recipe.prune
    layers = tuple(range(keys.layers)) if isinstance(keys.layers, int) else keys.layers
    blind = keys.replaced(by="random", teacher="original", layers=layers, iterations=1, merge="none")
    return recipe.replaced(prune=blind)


def run_stage(recipe: Recipe, stage: str, topology: Topology, ledger: Ledger, out: Path) -> Rehearsed:
    """Run a stage of a `rehearsable` recipe on this rank; `out`: an empty folder for what it writes."""
    rehearsed = Rehearsed()
    if stage in TRAINS:
        keys = recipe.correct if stage == "correct" else recipe.distill
        assert keys is not None
        window = recipe.distill.teacher_window if stage == "distill" else None
        every = keys.global_batch // (keys.micro_batch * topology.replicas)
        rehearsed.micro_batches, rehearsed.tokens = every, keys.micro_batch * recipe.data.sequence
        rehearsed.counts = _counts(every, topology, window or 1)
        steps = len(rehearsed.counts)
        short = keys.replaced(tokens=steps * keys.global_batch * recipe.data.sequence)
        recipe = recipe.replaced(**{stage: short})
    rehearsed.start = ledger.begin()
    done: dict[str, dict[str, object]] = {"prepare": {"model_hash": "", "sources": {}}, "correct": {"hash": ""}}
    at_out = recipe.replaced(out=out)
    context = RehearsedContext(
        at_out, topology, silent, done, lambda _: "rehearsal" * 2, ledger=ledger, rehearsed=rehearsed
    )
    does = PARTS.get(stage) or STAGES[stage].does
    does(context)
    return rehearsed


def _prune(context: RehearsedContext) -> None:
    """Cut and refit, with two numbers of micro-batches where there are many."""
    ledger, rehearsed = context.ledger, context.rehearsed
    ledger.wants_float64 = True
    rehearsed.micro_batches, rehearsed.counts = context.refit_micro_batches()
    started = ledger.now
    for _ in rehearsed.counts:
        gc.collect()
        for before in rehearsed.steps:  # what it left, such as mcore's caches, is no growth with the samples
            before.peak += ledger.now - started
        started = ledger.now
        rehearsed.steps.append(ledger.begin())
        STAGES["prune"].does(context)
    for before in rehearsed.steps[:-1]:
        before.peak_by_kind = rehearsed.steps[-1].peak_by_kind


def _search(context: RehearsedContext) -> None:
    """Measure the largest candidate on all samples; each replica measures a share of them, unless experts are spread
    over replicas or candidates are refitted."""
    ledger, rehearsed, keys, topology = context.ledger, context.rehearsed, context.recipe.score, context.topology
    teacher = read_config(context.recipe.model).shape
    candidates = candidates_of(context.recipe, teacher)
    widths = {axis: size for axis, size in candidates[0].sizes.items() if axis != "layers"}
    plan = random_plan(teacher, 0, layers=tuple(range(candidates[0].shape.layers)), **widths)
    model = context.load_prune_source(DTYPES[keys.dtype])
    apart = topology.ep == 1 and context.recipe.prune.refit == "none"
    rehearsed.repeats = -(-len(candidates) // (topology.dp if apart else 1))
    rehearsed.micro_batches = max(1, -(-keys.samples // keys.micro_batch))
    rehearsed.tokens = keys.micro_batch * context.recipe.data.sequence
    few = min(rehearsed.micro_batches, topology.pp)
    rehearsed.counts = [few] if few == rehearsed.micro_batches else [few, few + 1]
    for count in rehearsed.counts:
        gc.collect()
        rehearsed.steps.append(ledger.begin())
        zero_shot(model, ["candidate"], lambda _: plan, context.drawn(count, keys.micro_batch), topology=topology)


def _export(context: RehearsedContext) -> None:
    """Bring every Hugging Face tensor of the student to the host of the rank that writes it."""
    model = context.load(context.student)
    context.rehearsed.counts, context.rehearsed.micro_batches = [1], 1
    context.rehearsed.repeats = 2  # it is written, and hashed
    context.rehearsed.steps.append(context.ledger.begin())
    for _, tensor in full_tensors(model, context.topology, DTYPES[context.recipe.export.dtype]):
        tensor.cpu()
        del tensor


def _generate(context: RehearsedContext) -> None:
    """Generate one token and two after prompts that leave room for `MOST_TOKENS`; each token more costs the same."""
    ledger, rehearsed, topology = context.ledger, context.rehearsed, context.topology
    rows, sequence = context.recipe.evaluate.micro_batch, context.recipe.data.sequence
    model = context.load(context.student)
    most = min(MOST_TOKENS, sequence // 2)
    prompts = context.drawn(1, rows)[0].tokens[:, : sequence - most].cpu().tolist() * topology.dp
    rehearsed.tokens, rehearsed.micro_batches, rehearsed.counts = rows, most, [1, 2]
    with evaluating(model):
        for count in rehearsed.counts:
            gc.collect()
            rehearsed.steps.append(ledger.begin())
            Predictor(model, topology, micro_batch=rows).continuations(prompts, count)


PARTS: Mapping[str, Callable[[RehearsedContext], None]] = {
    "prune": _prune,
    "search": _search,
    "export": _export,
    "generate": _generate,
}
"""Parts of a run that are rehearsed otherwise than by their stage."""


def _counts(every: int, topology: Topology, window: int) -> list[int]:
    """Return the micro-batches of the rehearsed steps: a short one first, in which the optimizer's state is made, then
    one that fills the pipeline, and one with a unit more; or two whole steps where that is less."""
    unit = window if topology.vp == 1 else -(-window // topology.pp) * topology.pp
    full = -(-max(topology.pp, 1) // unit) * unit
    return [every] * 2 if every <= full + unit else [unit, full, full + unit]
