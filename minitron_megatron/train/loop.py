"""Training loop with checkpoints, resume and preemption."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from typing_extensions import TypedDict

from ..data import Batch
from ..errors import CheckpointError, FileError, Preempted, TrainingError
from ..events import Event, Listener, silent
from ..files import check_as
from ..layout import flops_per_token
from ..model import Checkpoints, CheckpointState, Model, check_finite, load_checkpoint, shape_of
from ..parallel import Topology, peak_flops
from .learner import Learner
from .objective import Objective
from .signals import any_rank_signalled
from .spikes import Spikes
from .straggler import StragglerMonitor
from .training import Training

__all__ = ["MOST_SKIPPED", "Saving", "train"]

MOST_SKIPPED = 10
"""Consecutive non-finite steps after which training stops."""

SCORE = "validation_loss"
"""Measurement by which the best checkpoint is chosen."""


class Saved(TypedDict):
    """Training state that a checkpoint must hold to resume from it."""

    step: int
    tokens: int
    skipped: int
    spikes: tuple[list[float], int]
    schedulers: list[dict[str, object]]


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a training: where to save every `save_every` steps and to resume from."""

    folder: Path | None = None
    """None: save nothing."""
    identity: str = ""
    """Name of the run that the checkpoints belong to; a training resumes only from its own."""
    begin: tuple[Path, str] | None = None
    """(folder, identity) of the previous phase, whose last checkpoint this phase starts from."""
    save_last: bool = False
    """Whether to save after the last step, for the next phase."""


def train(
    model: Model,
    objective: Objective,
    batches_of: Callable[[int], Sequence[Batch]],
    training: Training,
    topology: Topology,
    *,
    label: str = "train",
    saving: Saving | None = None,
    until: int | None = None,
    co_trained: Sequence[Learner] = (),
    validate: Callable[[], dict[str, float]] | None = None,
    listener: Listener = silent,
) -> dict[str, float]:
    """Train the chunks of `model` in place for `training.steps` steps. Collective over the world.

    batches_of: step (from 0) -> this rank's micro-batches. saving: None saves nothing. until: step after which to save
    and stop, with the schedule of the whole training. co_trained: models that the objective trains in the same steps.
    validate: measurements after every `validate_every` steps and at the end. Returns the last step's values: `loss`
    (nats per token, or per pair of responses), `tokens` (or `pairs`) seen, `skipped` steps, `spikes` of the loss.

    A step whose loss or gradient is not finite changes no weight. Raises TrainingError after `MOST_SKIPPED` such steps
    in a row and if there is no result (`_Run.finish`), and Preempted after a signal on any rank; saves first.
    """
    learners = [Learner(model, training, topology), *co_trained]
    run = _Run(learners, objective, training, topology, label, saving or Saving())
    try:
        run.resume()
        values = {objective.unit: float(run.tokens)}
        end = training.steps if until is None else min(until, training.steps)
        with any_rank_signalled(topology) as preempted:
            for step in range(run.step + 1, end + 1):
                values = run.advance(step, batches_of)
                if validate and (step == end or step % training.validate_every == 0):
                    values |= validate()
                listener(Event(label, step, training.steps, "steps", values))
                run.settle(values.get(SCORE), end, stop=preempted())  # also at the end: the stage still has to write
        run.finish(values)
        return values
    finally:
        run.release()


@dataclass
class _Run:
    """State of a running training: its counters and what a checkpoint holds besides the models.

    tokens: tokens seen, or what else the objective counts.
    """

    learners: Sequence[Learner]
    objective: Objective
    training: Training
    topology: Topology
    label: str
    saving: Saving
    store: Checkpoints | None = None
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: Spikes = field(default_factory=Spikes)

    def __post_init__(self) -> None:
        self.monitor = StragglerMonitor(self.topology)

    @property
    def diverged(self) -> bool:
        return self.skipped_in_a_row == MOST_SKIPPED

    def settle(self, score: float | None, end: int, *, stop: bool) -> None:
        """Save after a step where that is due; then raise TrainingError if it diverged, or Preempted to `stop`."""
        last = self.step == end
        save_last = self.saving.save_last or end < self.training.steps
        if stop or self.diverged or (save_last if last else self.step % self.training.save_every == 0):
            self.save(score, wait=last or stop or self.diverged)
        if self.diverged:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row, up to step {self.step}. "
                "Check the data of these steps, or lower the learning rate (`lr`)."
            )
        if stop:
            raise Preempted

    def advance(self, done: int, batches_of: Callable[[int], Sequence[Batch]]) -> dict[str, float]:
        """Run one step; return its measurements."""
        with self.monitor.alone():
            batches = batches_of(done - 1)
        began = time.perf_counter()
        torch.manual_seed(self.training.seed + done)
        loss, counted, norm = self.learners[0].step(batches, self.objective)
        loss /= max(counted, 1)
        self.step, self.tokens = done, self.tokens + counted
        if not math.isfinite(norm):
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        else:
            self.skipped_in_a_row = 0
            if self.spikes.see(loss):
                self._warn(f"step {done} of {self.label} has a loss of {loss:.4g}, far above that of the steps before.")
        values = {"loss": loss, "lr": self.learners[0].lr, "grad_norm": norm, self.objective.unit: self.tokens}
        values |= {"skipped": self.skipped, "spikes": self.spikes.count} | self.objective.finish()
        if self.store:
            self.store.poll()
        values |= self._rates(batches, counted, time.perf_counter() - began) | self.monitor.look(done)
        if self.monitor.straggler is not None and "slowest_rank" in values:
            times = values["slowest_seconds"] / values["median_seconds"]
            self._warn(
                f"rank {self.monitor.straggler} is a straggler: its own work takes {times:.1f} times the median. "
                "Check its machine."
            )
        return values

    def _rates(self, batches: Sequence[Batch], counted: int, seconds: float) -> dict[str, float]:
        """Return tokens per second, TFLOP/s per GPU and MFU.

        FLOPs are those of the model's own passes (backward counts as two forwards) and, apart, those of the teacher;
        recomputation is not counted. MFU only where the GPU's peak is known.
        """
        tokens = sum(batch.tokens.numel() for batch in batches) * self.topology.dp
        second = tokens / seconds / self.topology.world
        shape = shape_of(self.learners[0].chunks[0].module)
        sequence = batches[0].tokens.shape[1] * self.topology.cp
        work = {"": 3 * flops_per_token(shape, sequence), "teacher_": self.objective.further_flops(sequence)}
        rates = {f"{self.objective.unit}_per_second": counted / seconds}
        for name, flops in work.items():
            if flops:
                rates[f"{name}tflops"] = flops * second / 1e12
            if flops and (peak := peak_flops()):
                rates[f"{name}mfu"] = flops * second / peak
        return rates

    def finish(self, values: Mapping[str, float]) -> None:
        """Wait for the checkpoint that is being written.

        Raises TrainingError if there is no result: every step was skipped, or the weights or the last validation
        (without one: the last loss) are not finite.
        """
        if self.store:
            self.store.poll(wait=True)
        self._expect_finite()
        last = values.get(SCORE, values.get("loss", 0.0))
        if not math.isfinite(last) or self.skipped_in_a_row == self.training.steps or not self._all_updated():
            raise TrainingError(
                f"{self.label} ended at step {self.step} without a result: its loss is not finite. Check the data, or "
                "lower the learning rate (`lr`)."
            )

    def _all_updated(self) -> bool:
        return all(learner.has_updated for learner in self.learners)

    def _expect_finite(self) -> None:
        for learner in self.learners:
            name = f"the {learner.trainee.name or 'model'} that `{self.label}` trains"
            advice = "Lower the learning rate (`lr`), or check the data; checkpoints of earlier steps are kept."
            check_finite(
                [chunk.module for chunk in learner.chunks], f"{name}, after step {self.step},", advice, TrainingError
            )

    def save(self, score: float | None, *, wait: bool) -> None:
        """Save a checkpoint, unless every step so far was skipped: then training starts again at its beginning."""
        if self.store is None or not self._all_updated():
            return
        self._expect_finite()
        state = {
            "identity": self.saving.identity,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "spikes": [self.spikes.losses, self.spikes.count],
            "schedulers": [learner.scheduler.state_dict() for learner in self.learners],
        }
        self.store.save(self.step, [learner.trainee for learner in self.learners], state, score=score, wait=wait)

    def resume(self) -> None:
        """Resume from the newest readable checkpoint, else from the end of the previous phase, if any."""
        training, begin = self.training, self.saving.begin
        if self.saving.folder is not None:
            keep, asynchronous = training.keep_checkpoints, training.save_async
            self.store = Checkpoints(self.saving.folder, self.topology, keep=keep, asynchronous=asynchronous)
        state = self._newest(self.store, self.saving.identity) if self.store else None
        if state:
            self._resume_schedules(state["schedulers"])
            self.step, self.spikes = state["step"], Spikes(*state["spikes"])
        elif begin is not None:
            state = self._newest(Checkpoints(begin[0], self.topology), begin[1])
            if state is None:
                raise CheckpointError(
                    f"{begin[0]} holds no checkpoint to start from. Remove that folder to train its phase again."
                )
        if state:
            self.tokens, self.skipped = state["tokens"], state["skipped"]

    def _resume_schedules(self, schedules: Sequence[dict[str, object]]) -> None:
        try:
            for learner, schedule in zip(self.learners, schedules, strict=True):
                learner.scheduler.load_state_dict(schedule)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            assert self.store is not None
            raise CheckpointError(
                f"the newest checkpoint in {self.store.folder} has a learning rate schedule of another training. "
                "Remove it to resume from the one before."
            ) from error

    def _newest(self, store: Checkpoints, identity: str) -> CheckpointState | None:
        """Load the newest readable checkpoint and return its state; None if there is no checkpoint.

        Raises CheckpointError if there are checkpoints but none can be read.
        """
        trainees = [learner.trainee for learner in self.learners]
        paths = store.newest_first()
        for path, older in zip_longest(paths, paths[1:]):
            try:
                state = load_checkpoint(path, trainees, identity)
                check_as(state, Saved, f"{path}'s state")
                for learner in self.learners:
                    learner.has_updated = True
                return state
            except (CheckpointError, FileError) as error:
                if older is None:
                    raise CheckpointError(
                        f"{error} There is no older checkpoint: remove {store.folder} to start again."
                    ) from error
                self._warn(f"{error} Resuming from {older.name} instead.")
        return None

    def _warn(self, sentence: str) -> None:
        if self.topology.rank == 0:
            warnings.warn(sentence, stacklevel=3)

    def release(self) -> None:
        """Stop writing checkpoints, and free the memory of training."""
        if self.store:
            self.store.close()
        for learner in self.learners:
            learner.release()
