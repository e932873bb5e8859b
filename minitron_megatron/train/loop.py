"""One loop for everything that trains."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Batch
from ..errors import Preempted, TrainingError
from ..events import Event, Listener, silent
from ..model import chunks_of, forward_backward, latest_checkpoint, load_checkpoint, save_checkpoint
from ..parallel import Topology, mend_distributed_optimizer, sum_over_world
from .evaluate import global_sums
from .objective import Objective
from .signals import listening

__all__ = ["MOST_SKIPPED", "Training", "train"]

MOST_SKIPPED = 10
"""Steps in a row that are not finite, after which training stops."""


@dataclass(frozen=True)
class Training:
    """How long and how fast. The defaults of the optimizer are NeMo's for these models; the papers name none."""

    steps: int
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """At the end of the cosine."""
    warmup_steps: int = 40
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    clip: float = 1.0
    """Largest global norm of a step's gradient."""
    save_every: int = 100
    """Steps between checkpoints."""
    validate_every: int = 100
    """Steps between validations."""


def train(
    model: Any,
    objective: Objective,
    batches_of: Callable[[int], Sequence[Batch]],
    training: Training,
    topology: Topology,
    *,
    label: str = "train",
    checkpoints: Path | None = None,
    identity: str = "",
    validate: Callable[[], dict[str, float]] | None = None,
    listener: Listener = silent,
) -> dict[str, float]:
    """Trains the chunks of `model` in place for `training.steps` steps. Collective over the world.

    batches_of: step from 0 -> this rank's micro-batches. checkpoints: where to save every `save_every` steps, and to
    resume from if something is there; `identity` names the run they belong to. validate: measurements after every
    `validate_every` steps and at the end. Returns the last step's values: `loss` (nats per token), `tokens` seen,
    `skipped` steps.

    A step whose loss or gradient is not finite changes nothing and is counted; `MOST_SKIPPED` of them in a row raise
    TrainingError. SIGTERM or SIGUSR1 at any rank raises Preempted after the step at work. Both save the state first.
    """
    chunks, optimizer, scheduler = _set_up(chunks_of(model), training, topology)

    def save(done: int) -> None:
        state = {"identity": identity, "tokens": tokens, "skipped": skipped, "scheduler": scheduler.state_dict()}
        if checkpoints:
            save_checkpoint(checkpoints, done, chunks, optimizer, state, topology)

    try:
        start, tokens, skipped = _resume(checkpoints, identity, chunks, optimizer, scheduler)
        values, in_a_row = {"tokens": float(tokens)}, 0
        with listening(topology) as preempted:
            for done in range(start + 1, training.steps + 1):
                began = time.perf_counter()
                loss, counted, norm = _step(chunks, optimizer, scheduler, objective, batches_of(done - 1), topology)
                tokens, in_a_row = tokens + counted, 0 if math.isfinite(norm) else in_a_row + 1
                skipped += in_a_row > 0
                values = {
                    "loss": loss / max(counted, 1),
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": norm,
                    "tokens": tokens,
                    "skipped": skipped,
                    "tokens_per_second": counted / (time.perf_counter() - began),
                }
                if validate and (done % training.validate_every == 0 or done == training.steps):
                    values |= validate()
                listener(Event(label, done, training.steps, "steps", values))
                stop = preempted() and done < training.steps
                if stop or in_a_row == MOST_SKIPPED or (done % training.save_every == 0 and done < training.steps):
                    save(done)
                if in_a_row == MOST_SKIPPED:
                    raise _broken(in_a_row, done, label)
                if stop:
                    raise Preempted
        return values
    finally:
        _release(chunks)


def _broken(steps: int, done: int, label: str) -> TrainingError:
    return TrainingError(
        f"the loss or its gradient was not finite in {steps} steps in a row, up to step {done}. "
        f"Look at the data around it, or lower {label}.lr."
    )


def _step(
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    objective: Objective,
    batches: Sequence[Batch],
    topology: Topology,
) -> tuple[float, int, float]:
    """One update: (summed loss in nats, counted tokens, norm of the gradient), of the global batch.

    Where the loss or a gradient is not finite, nothing changes, and the norm is not a number.
    """
    objective.prepare(batches)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss, counted = global_sums(*forward_backward(chunks, batches, objective.loss), topology)
    scheduler.step(increment=1)  # before the update, so that the first step has lr / warmup_steps and not zero
    if not (math.isfinite(loss) and _finite(chunks, topology)):
        return loss, counted, math.nan
    _, norm, _ = optimizer.step()
    return loss, counted, float(norm or 0.0)


def _finite(chunks: Sequence[Any], topology: Topology) -> bool:
    """Whether all gradients are, of every rank: mcore looks only where a loss scaler is at work. Collective."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    broken = sum(int(not buffer.grad_data.isfinite().all()) for buffer in buffers)
    return not int(sum_over_world(torch.tensor(broken, device=topology.device)))


def _release(chunks: Sequence[Any]) -> None:
    """Lets go of gradients, optimizer and groups: mcore ties them into cycles that run through autograd's own nodes,
    which Python's collector cannot see, so that they would outlive the model."""
    for chunk in chunks:
        chunk.grad_accs.clear()
        chunk.config.grad_scale_func = chunk.config.finalize_model_grads_func = None
        for parameter in chunk.parameters():
            parameter.main_grad = None
    gc.collect()


def _set_up(chunks: Sequence[Any], training: Training, topology: Topology) -> tuple[list[Any], Any, Any]:
    """mcore's DDP around each chunk, its distributed optimizer and its scheduler."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    mend_distributed_optimizer()
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, ddp, chunk.train()) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.lr,
            min_lr=training.min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.beta1,
            adam_beta2=training.beta2,
            adam_eps=training.eps,
            clip_grad=training.clip,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        wrapped,
    )
    for each in chunks:
        each.config.finalize_model_grads_func = finalize_model_grads
        each.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.warmup_steps,
        lr_decay_steps=max(training.steps, training.warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.steps,
        wd_incr_style="constant",
    )
    return wrapped, optimizer, scheduler


def _resume(folder: Path | None, identity: str, chunks: Any, optimizer: Any, scheduler: Any) -> tuple[int, int, int]:
    """(steps done, tokens seen, steps skipped) of the newest checkpoint, now loaded; zeros where there is none."""
    path = latest_checkpoint(folder) if folder else None
    if path is None:
        return 0, 0, 0
    state = load_checkpoint(path, chunks, optimizer, identity)
    scheduler.load_state_dict(state["scheduler"])
    return state["step"], state["tokens"], state["skipped"]
