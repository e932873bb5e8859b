"""mcore's pipeline schedules, seen as one call: run these micro-batches through this model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..parallel import final_hidden
from .build import chunks_of

__all__ = ["MicroBatch", "forward_backward", "forward_only", "windows"]


class MicroBatch(Protocol):
    """What a schedule needs of a micro-batch; `data.Batch` has it."""

    @property
    def tokens(self) -> Tensor:
        """int64 [batch, seq]."""
        ...

    @property
    def mask(self) -> Tensor:
        """bool [batch, seq]: the tokens that count."""
        ...


LossOf = Callable[[Any, Tensor, Any, int], Tensor]
"""(chunk, hidden, batch, index of the micro-batch) -> summed loss."""

Indexed = Iterator[tuple[int, MicroBatch]]


def forward_backward(
    model: Any, batches: Sequence[MicroBatch], loss_of: LossOf, *, backward: bool = True
) -> tuple[Tensor, Tensor]:
    """Runs a step's micro-batches; gradients accumulate in the model's buffers, divided by the global count of tokens.

    Returns (summed loss in nats: fp64, counted tokens: int64) of this rank's micro-batches, zero before the last
    pipeline stage. Collective over the model's ranks.
    """

    def last(chunk: Any, batch: MicroBatch, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, tokens = loss_of(chunk, hidden, batch, index), batch.mask.sum()
        return loss, tokens.int(), torch.stack([loss.detach().double(), tokens.double()])

    sums = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
    for pair in _run(model, batches, last, None, forward_only=not backward):
        sums += pair
    return sums[0], sums[1].long()


def forward_only(
    model: Any, batches: Sequence[MicroBatch], *, before: Callable[[MicroBatch], None] | None = None
) -> list[Tensor]:
    """The final hidden states of each micro-batch, in order, without gradients; empty before the last pipeline stage.

    before: called with a micro-batch each time one of this rank's chunks is about to run it. Collective over the
    model's ranks.
    """

    def last(chunk: Any, batch: MicroBatch, index: int, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        return hidden

    with torch.no_grad():
        return _run(model, batches, last, before, forward_only=True, collect_non_loss_data=True)


def windows(batches: Sequence[Any], pp: int, rounds: int = 4) -> list[Sequence[Any]]:
    """Cuts micro-batches into runs of about `rounds * pp`, never fewer than `pp` while there are as many: enough
    to fill the pipeline, few enough to keep what a run leaves behind."""
    size = rounds * pp
    cuts = list(range(0, max(len(batches) - pp, 0) + 1, size))
    return [batches[a:b] for a, b in zip(cuts, [*cuts[1:], len(batches)], strict=True)]


def _run(
    model: Any,
    batches: Sequence[MicroBatch],
    last: Callable[..., Any],
    before: Callable[[MicroBatch], None] | None,
    **options: Any,
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    def step(iterator: Indexed, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(iterator)
        if before:
            before(batch)
        gpt = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
        return final_hidden(gpt, batch.tokens), partial(last, gpt, batch, index)

    chunks = chunks_of(model)
    iterators = [iter(enumerate(batches)) for _ in chunks]
    micro_batch, sequence = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence,
        micro_batch_size=micro_batch,
        **options,
    )
