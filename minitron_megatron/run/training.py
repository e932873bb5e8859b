"""Training as the recipe configures it: phases, teacher, objective and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..distill import ContinuousObjective, KDObjective, StateLoss
from ..evaluate import ValidationSet, validation_loss
from ..events import Event
from ..files import file_marks
from ..model import Chunk, shape_of
from ..recipe import Recipe, ResolvedPhase, TrainingKeys, resolved
from ..train import OBJECTIVES, Learner, Lora, Objective, Saving, Training, train, train_norms_only
from .context import Context

__all__ = ["correcting", "distil", "distillation_inputs", "train_in_phases"]

Measure = Callable[[], dict[str, float]]


def distillation_inputs(recipe: Recipe) -> list[object]:
    """Return the further inputs of distillation: all of `correct` if it is continuous, and the files of
    `distill.start` or of the `student`. Held-out text is not one of them, since validation changes no weight."""
    correct = recipe.correct.deciding() if recipe.correct and recipe.correct.continuous else None
    start = recipe.distill.start or recipe.student
    return [correct, file_marks([start] if start else [])]


def distil(context: Context, student: list[Chunk], label: str, *, until: int | None = None) -> int:
    """Train a student in place, by distillation from the run's teacher or without it, as `distill.objective` says;
    return the tokens seen.

    until: step to stop after; another call resumes from it.
    """
    keys, correct, topology = context.recipe.distill, context.recipe.correct, context.topology
    if not keys.has_teacher:
        return train_in_phases(context, student, OBJECTIVES[keys.objective](topology), keys, label, until=until)
    continuous = correct is not None and correct.continuous
    teacher, loss = context.load_teacher(trains=continuous), keys.loss
    vocab = shape_of(student[0]).vocab
    shared = min(vocab, shape_of(teacher[0]).vocab)  # they differ in padding alone, as `check` has seen
    states = _states(context, teacher, student)
    if not continuous:
        objective = KDObjective(
            teacher,
            topology,
            vocab=vocab,
            shared=shared,
            loss=loss,
            states=states,
            window=keys.teacher_window,
            offload=keys.offload_teacher,
            pack=keys.teacher_dtype == "float8",
        )
        with _released(states):
            return train_in_phases(context, student, objective, keys, label, until=until)
    assert correct is not None

    def taught(phase: ResolvedPhase) -> ContinuousObjective:
        """Return a phase's objective; the teacher's schedule is as long as the phase."""
        # mcore reduces a gradient early only where every parameter has one, and not all of a teacher's do
        learner = Learner(teacher, Training.of(correct, phase.steps, seed=0), topology, "teacher", overlap=False)
        return ContinuousObjective(learner, topology, vocab=vocab, shared=shared, loss=loss, states=states)

    with correcting(context, teacher), _released(states):
        return train_in_phases(context, student, taught, keys, label, until=until)


@contextmanager
def correcting(context: Context, teacher: list[Chunk]) -> Iterator[None]:
    """Make the parameters in `correct.parameters` trainable inside the context; afterwards the teacher is a plain model
    with LoRA merged."""
    correct = context.recipe.correct
    assert correct is not None
    if correct.parameters == "norms":
        train_norms_only(teacher)
    lora = None
    if correct.parameters == "lora":
        lora = Lora(teacher, context.topology, rank=correct.lora_rank, seed=context.recipe.seed)
    yield
    if lora:
        lora.merge()


def _states(context: Context, teacher: list[Chunk], student: list[Chunk]) -> StateLoss | None:
    keys, seed = context.recipe.distill.states, context.recipe.seed
    return StateLoss(teacher, student, keys, context.topology, seed=seed) if keys else None


@contextmanager
def _released(states: StateLoss | None) -> Iterator[None]:
    """Remove the hooks and bridges of `states` from the models at the end."""
    try:
        yield
    finally:
        if states:
            states.release()


def train_in_phases(
    context: Context,
    model: list[Chunk],
    objective: Objective | Callable[[ResolvedPhase], ContinuousObjective],
    keys: TrainingKeys,
    label: str,
    *,
    until: int | None = None,
) -> int:
    """Train in place, with checkpoints and validation; return the tokens seen.

    objective: one for all phases, or a function phase -> objective. Validation measures the divergence from its
    teacher, if it has one.
    """
    phases, held_out, tokens, before = resolved(keys, context.recipe.data), context.held_out(), 0, None
    total, first, retain = sum(phase.steps for phase in phases), 0, label == "distill" and context.recipe.distill.retain
    for number, (phase, at) in enumerate(zip(phases, context.phase_checkpoints, strict=False)):
        current = objective(phase) if callable(objective) else objective
        co_trained = [current.learner] if isinstance(current, ContinuousObjective) else []
        values = train(
            model,
            current,
            context.training_batches(phase, context.recipe.seed + number),
            Training.of(phase.keys, phase.steps, context.recipe.seed),
            context.topology,
            label=label,
            saving=Saving(*at, before, save_last=len(phases) > 1 or retain),
            until=until,
            co_trained=co_trained,
            validate=_validation(context, model, held_out, current),
            listener=_shifted(context.listener, first, total),
        )
        tokens, before, first = int(values["tokens"]), at, first + phase.steps
    return tokens


def _validation(context: Context, model: list[Chunk], held_out: ValidationSet, objective: Objective) -> Measure:
    """Return a function that measures cross-entropy on each source, and the divergence from the teacher, if any."""

    def measure() -> dict[str, float]:
        losses = validation_loss(model, held_out, context.topology)
        found = {"validation_loss": losses["all"]}
        found |= {f"validation_loss/{source}": loss for source, loss in losses.items() if source != "all"}
        if isinstance(objective, KDObjective):
            found["validation_kl"] = validation_loss(model, held_out, context.topology, objective.plain())["all"]
        return found

    return measure


def _shifted(listener: Callable[[Event], None], first: int, total: int) -> Callable[[Event], None]:
    """Return a listener that counts the steps of all phases as one sequence."""
    return lambda event: listener(replace(event, done=event.done + first, total=total))
