"""mcore's pipeline schedules as one call: run micro-batches through a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import numbers
from ..errors import TopologyError
from ..parallel import final_hidden
from .chunk import Chunk, Model, chunks_of

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["MicroBatch", "States", "forward_backward", "forward_kept", "forward_only", "forward_rest", "windows"]


class MicroBatch(Protocol):
    """Interface of a micro-batch, which `data.Batch` implements.

    An optional attribute `attention_context` is passed to attention as its context: see `final_hidden`.
    """

    @property
    def tokens(self) -> Tensor:
        """int64 [batch, seq]."""
        ...

    @property
    def mask(self) -> Tensor:
        """bool [batch, seq]: tokens that count in the loss."""
        ...


class TrainingBatch(MicroBatch, Protocol):
    """Interface of a micro-batch that a loss is taken of."""

    @property
    def counted(self) -> Tensor:
        """Number of tokens (or of other units) over which the loss is averaged."""
        ...


Item = TypeVar("Item")
BatchT = TypeVar("BatchT", bound=MicroBatch)
TrainingT = TypeVar("TrainingT", bound=TrainingBatch)

LossOf = Callable[[Chunk, Tensor, BatchT, int], Tensor]
"""(chunk, hidden, batch, index of the micro-batch) -> summed loss."""

States = Mapping[int, Tensor]
"""Layer -> its input hidden states: [seq (over tp with sequence parallelism), batch, hidden]. The output of a chunk's
last layer has the next number as its key."""

Forward = Callable[[Chunk, BatchT, int], Tensor]
"""(chunk, batch, index of the micro-batch) -> the chunk's output."""

Indexed = Iterator[tuple[int, BatchT]]


def forward_backward(
    model: Model,
    batches: Sequence[TrainingT],
    loss_of: LossOf[TrainingT],
    *,
    backward: bool = True,
    forward: Forward[TrainingT] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the micro-batches of a step; gradients accumulate in the model's buffers, divided by the global count.

    Returns (summed loss in nats: fp64, what the batches count: int64) of this rank's micro-batches; zeros before the
    last pipeline stage. forward: replaces a chunk's forward pass. Collective over the model's ranks.
    """

    def last(chunk: Chunk, batch: TrainingT, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, count = loss_of(chunk, hidden, batch, index), batch.counted
        return loss, count.int(), torch.stack([loss.detach().double(), count.double()])

    sums = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
    for loss_and_count in _run_schedule(model, batches, last, forward or run_chunk, forward_only=not backward):
        sums += loss_and_count
    return sums[0], sums[1].long()


def forward_only(
    model: Model,
    batches: Sequence[MicroBatch],
    *,
    before: Callable[[MicroBatch], None] | None = None,
    without: Collection[int] = (),
) -> list[Tensor]:
    """Return the final hidden states of each micro-batch, without gradients; empty before the last pipeline stage.

    before: called with a micro-batch each time before one of this rank's chunks runs it. without: layers to skip.
    Collective over the model's ranks.
    """

    def forward(chunk: Chunk, batch: MicroBatch, index: int) -> Tensor:
        if before:
            before(batch)
        return _through(chunk, batch, _layers(chunk, without)) if without else run_chunk(chunk, batch, index)

    return _collect(model, batches, _hidden, forward)


def forward_kept(
    model: Model, batches: Sequence[MicroBatch], *, without: Collection[int] = ()
) -> tuple[list[Tensor], list[States]]:
    """Run `forward_only`, and also return for each micro-batch the input states of this rank's layers, except skipped
    ones.

    The kept states are (layers of the rank + 1) x micro-batches x seq x batch x hidden numbers.
    """
    kept: list[dict[int, Tensor]] = [{} for _ in batches]

    def forward(chunk: Chunk, batch: MicroBatch, index: int) -> Tensor:
        layers = _layers(chunk, without)
        keep = partial(_keep, kept[index])
        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers.values()]
        try:
            return _through(chunk, batch, layers)
        finally:
            for handle in handles:
                handle.remove()

    return _collect(model, batches, _hidden, forward), list(kept)


def forward_rest(
    model: Model,
    batches: Sequence[BatchT],
    kept: Sequence[States],
    blocks: Sequence[Collection[int]],
    value_of: LossOf[BatchT],
    *,
    without: Collection[int] = (),
) -> Tensor:
    """Return `value_of` the network without `without` and without one of `blocks` at a time: [blocks, micro-batches].

    kept: the states that `forward_kept` returned for these batches and `without`. Layers before a block's first layer
    do not run again: the stage that holds that layer starts from the kept states, and ignores what earlier stages send.
    A value is one number; before the last pipeline stage it is zero. Collective over the model's ranks.
    """

    def forward(chunk: Chunk, batch: BatchT, index: int) -> Tensor:
        block, first = blocks[index // len(batches)], min(blocks[index // len(batches)])
        rest = {at: layer for at, layer in _layers(chunk, (*without, *block)).items() if at > first}
        if first in _layers(chunk):
            rest = {first: _KeptStates(kept[index % len(batches)][first])} | rest
        return _through(chunk, batch, rest)

    def last(chunk: Chunk, batch: BatchT, index: int, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        return value_of(chunk, hidden, batch, index % len(batches))

    values = _collect(model, [*batches] * len(blocks), last, forward)
    if not values:
        return torch.zeros(len(blocks), len(batches), device=batches[0].tokens.device)
    return torch.stack(values).view(len(blocks), len(batches))


def windows(batches: Sequence[Item], pp: int, rounds: int = 4) -> list[Sequence[Item]]:
    """Cut micro-batches into windows of about `rounds * pp`: enough to fill the pipeline, few enough to keep the
    results.

    A window has at least `pp` micro-batches if there are as many, and a multiple of `pp` if their total is one.
    """
    size = rounds * pp
    cuts = list(range(0, max(len(batches) - pp, 0) + 1, size))
    return [batches[a:b] for a, b in zip(cuts, [*cuts[1:], len(batches)], strict=True)]


class _KeptStates(nn.Module):
    """Stand-in for a layer that returns kept states, whatever its input."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: object) -> tuple[Tensor, None]:
        return self.states.detach(), None  # a new tensor object: mcore may free the data of an output after sending it


def _keep(
    states: dict[int, Tensor],
    layer: TransformerLayer,
    args: object,
    inputs: Mapping[str, Tensor],
    outputs: tuple[Tensor, ...],
) -> None:
    """Store a layer's input and output states (a forward hook)."""
    at = layer.layer_number - 1
    states[at], states[at + 1] = inputs["hidden_states"].detach(), outputs[0].detach()


def _layers(chunk: Chunk, without: Collection[int] = ()) -> dict[int, TransformerLayer]:
    """Return the layers of a chunk by their number in the whole model, from 0, except for `without`."""
    numbered = {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
    return {at: layer for at, layer in numbered.items() if at not in without}


def _through(chunk: Chunk, batch: MicroBatch, layers: Mapping[int, nn.Module]) -> Tensor:
    """Return a chunk's output, computed with `layers` in place of its own."""
    own_layers = chunk.decoder.layers
    chunk.decoder.layers = nn.ModuleList(layers.values())
    try:
        return run_chunk(chunk, batch)
    finally:
        chunk.decoder.layers = own_layers


def run_chunk(chunk: Chunk, batch: MicroBatch, index: int = 0) -> Tensor:
    """Run a chunk by itself, up to its last layer and the final norm that it may have."""
    return final_hidden(chunk, batch.tokens, getattr(batch, "attention_context", None))


def _hidden(chunk: Chunk, batch: MicroBatch, index: int, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
    return hidden


def _collect(
    model: Model, batches: Sequence[BatchT], last: Callable[..., Tensor], forward: Forward[BatchT]
) -> list[Tensor]:
    """Return `last` of each micro-batch's final hidden states, without gradients."""
    with torch.no_grad():
        return _run_schedule(model, batches, last, forward, forward_only=True, collect_non_loss_data=True)


def _run_schedule(
    model: Model, batches: Sequence[BatchT], last: Callable[..., object], forward: Forward[BatchT], **options: object
) -> list[Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    def step(iterator: Indexed[BatchT], chunk: Chunk) -> tuple[Tensor, Callable[..., object]]:
        index, batch = next(iterator)
        gpt = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
        return forward(gpt, batch, index), partial(last, gpt, batch, index)

    chunks = chunks_of(model)
    _check_interleaving(chunks, len(batches))
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


def _check_interleaving(chunks: Sequence[Chunk], micro_batches: int) -> None:
    """Raise TopologyError where mcore would raise an error that does not name the settings to change."""
    pp, group = chunks[0].config.pipeline_model_parallel_size, chunks[0].config.microbatch_group_size_per_vp_stage
    if len(chunks) > 1 and (micro_batches < group or 0 < micro_batches % group < pp):
        raise TopologyError(
            f"{numbers.counted(micro_batches, 'micro-batch', 'micro-batches')} cannot be interleaved over pp={pp} "
            f"(vp={len(chunks)}). Give each data-parallel rank "
            f"a multiple of {group} (global_batch or samples / (micro_batch x dp)), or set vp to 1."
        )
