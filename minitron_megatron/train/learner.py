"""A model in training, with its optimizer and schedule."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import Batch
from ..model import Chunk, Model, Trainee, WrappedChunk, are_finite, chunks_of, forward_backward
from ..parallel import Topology, count_padding, mend_distributed_optimizer, sum_over_world
from .evaluate import global_sums
from .objective import Objective
from .training import Training

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = ["Learner"]

BUCKETS = 8
"""Parts in which gradients are reduced over replicas while the backward pass goes on. A rank holds an equal share of
each part, a piece of a few tensors; with many parts it would need nearly all optimizer states on resume."""


class Learner:
    """A model wrapped in mcore's DDP, chunk by chunk, with mcore's distributed optimizer and scheduler.

    Call `release` at the end; otherwise gradients and optimizer outlive the model.
    """

    def __init__(
        self, model: Model, training: Training, topology: Topology, name: str = "", *, overlap: bool = True
    ) -> None:
        """name: distinguishes the models of one run. overlap: reduce gradients during the last backward pass of a step.
        Collective over the world."""
        self.topology = topology
        self._finalize = _Finalize()
        self.chunks, self.optimizer = _wrapped(chunks_of(model), training, self._finalize, overlap)
        self.scheduler = _schedule(self.optimizer, training)
        self.trainee = Trainee(self.chunks, self.optimizer, name)
        self.has_updated = False
        """Whether there was an update, here or before a resume; until then the optimizer has no state to save."""

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, batches: Sequence[Batch], objective: Objective) -> tuple[float, int, float]:
        """Run one update; return (summed loss in nats, counted tokens, gradient norm) of the global batch.

        If the loss or a gradient is not finite, no weight changes and the norm is NaN. Collective over the world.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, counted = self._passes(batches, objective)
        self.scheduler.step(increment=1)  # before the update, so that the first step has lr / warmup_steps and not zero
        if not (math.isfinite(loss) and self._finite()):
            return loss, counted, math.nan
        _, norm, _ = self.optimizer.step()
        self.has_updated = True
        return loss, counted, float(norm or 0.0)

    def _passes(self, batches: Sequence[Batch], objective: Objective) -> tuple[float, int]:
        """Run forward and backward over the step's micro-batches; return the global (summed loss, counted tokens)."""
        size = objective.window or len(batches)
        windows = [batches[at : at + size] for at in range(0, len(batches), size)]
        self._finalize.expect(len(windows))
        losses, counts = [], []
        for window in windows:
            objective.prepare(window)
            loss, counted = forward_backward(self.chunks, window, objective.loss, forward=objective.forward)
            losses.append(loss)
            counts.append(counted)
        return global_sums(torch.stack(losses).sum(), torch.stack(counts).sum(), self.topology)

    def _finite(self) -> bool:
        """Return whether the gradients of all ranks are finite; mcore checks only with a loss scaler. Collective."""
        buffers = [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        broken = (~are_finite([buffer.grad_data for buffer in buffers])).sum()
        return not int(sum_over_world(broken))

    def release(self) -> None:
        """Free gradients, optimizer and groups.

        mcore's reference cycles run through autograd nodes, which Python's garbage collector cannot see: without this
        call they would outlive the model.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()
            config = chunk.config
            config.grad_scale_func = config.finalize_model_grads_func = config.no_sync_func = None
            for parameter in chunk.parameters():
                parameter.main_grad = None
        gc.collect()


class _Finalize:
    """mcore's callback at the end of a schedule: reduces gradients over ranks and divides by the counted tokens.

    A step of several windows reduces and divides once, after its last window.
    """

    left = 0
    tokens: int | Tensor = 0

    def expect(self, windows: int) -> None:
        self.left, self.tokens = windows, 0

    def __call__(self, model: Sequence[WrappedChunk], num_tokens: Tensor, **options: object) -> None:
        from megatron.core.distributed import finalize_model_grads

        self.left, self.tokens = self.left - 1, self.tokens + num_tokens
        if not self.left:
            finalize_model_grads(model, self.tokens, **options)

    @contextmanager
    def unsynced(self, wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
        """Keep gradients from being reduced inside the context, which mcore's schedule leaves for a window's last
        micro-batch; after it they are reduced in the last window alone."""
        groups = [group for each in wrapped for group in (*each.bucket_groups, *each.expert_parallel_bucket_groups)]
        for group in groups:
            group.is_last_microbatch = False
        try:
            yield
        finally:
            for group in groups:
                group.is_last_microbatch = self.left == 1


def _wrapped(
    chunks: Sequence[Chunk], training: Training, finalize: _Finalize, overlap: bool
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    mend_distributed_optimizer()
    config = chunks[0].config
    numbers = max(sum(each.numel() for each in chunk.parameters() if each.requires_grad) for chunk in chunks)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        bucket_size=max(1, -(-numbers // BUCKETS)),
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk.train()) for chunk in chunks]
    count_padding(wrapped)
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
        each.config.finalize_model_grads_func = finalize
        each.config.grad_scale_func = optimizer.scale_loss
        each.config.no_sync_func = partial(finalize.unsynced, wrapped) if overlap else None
    return wrapped, optimizer


def _schedule(optimizer: MegatronOptimizer, training: Training) -> OptimizerParamScheduler:
    """Return mcore's scheduler: linear warm-up, then cosine decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
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
