"""mcore's pipeline schedules, seen as one call: run these micro-batches through this model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import TopologyError
from ..parallel import final_hidden
from .build import chunks_of

__all__ = ["MicroBatch", "States", "forward_backward", "forward_kept", "forward_only", "forward_rest", "windows"]


class MicroBatch(Protocol):
    """What a schedule needs of a micro-batch; `data.Batch` has it. What it has `beside` its tokens, attention is told:
    see `final_hidden`."""

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

States = Mapping[int, Tensor]
"""Layer -> the hidden states that enter it: [seq (over tp with sequence parallelism), batch, hidden]. What leaves the
last layer of a chunk stands under the next number."""

Forward = Callable[[Any, Any, int], Tensor]
"""(chunk, batch, index of the micro-batch) -> the chunk's output."""

Indexed = Iterator[tuple[int, MicroBatch]]


def forward_backward(
    model: Any,
    batches: Sequence[MicroBatch],
    loss_of: LossOf,
    *,
    backward: bool = True,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a step's micro-batches; gradients accumulate in the model's buffers, divided by the global count of tokens.

    Returns (summed loss in nats: fp64, counted tokens: int64) of this rank's micro-batches, zero before the last
    pipeline stage. forward: in the place of a chunk's own pass. Collective over the model's ranks.
    """

    def last(chunk: Any, batch: MicroBatch, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, tokens = loss_of(chunk, hidden, batch, index), batch.mask.sum()
        return loss, tokens.int(), torch.stack([loss.detach().double(), tokens.double()])

    sums = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens.device)
    for pair in _run(model, batches, last, forward or run_chunk, forward_only=not backward):
        sums += pair
    return sums[0], sums[1].long()


def forward_only(
    model: Any,
    batches: Sequence[MicroBatch],
    *,
    before: Callable[[MicroBatch], None] | None = None,
    without: Collection[int] = (),
) -> list[Tensor]:
    """The final hidden states of each micro-batch, in order, without gradients; empty before the last pipeline stage.

    before: called with a micro-batch each time one of this rank's chunks is about to run it. without: layers to leave
    out. Collective over the model's ranks.
    """

    def forward(chunk: Any, batch: MicroBatch, index: int) -> Tensor:
        if before:
            before(batch)
        return _through(chunk, batch, _layers(chunk, without)) if without else run_chunk(chunk, batch, index)

    return _collect(model, batches, _hidden, forward)


def forward_kept(
    model: Any, batches: Sequence[MicroBatch], *, without: Collection[int] = ()
) -> tuple[list[Tensor], list[States]]:
    """`forward_only`, and of each micro-batch the states that enter this rank's layers, but for those left out.

    What is kept weighs (layers of the rank + 1) x micro-batches x seq x batch x hidden numbers.
    """
    kept: list[dict[int, Tensor]] = [{} for _ in batches]

    def forward(chunk: Any, batch: MicroBatch, index: int) -> Tensor:
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
    model: Any,
    batches: Sequence[MicroBatch],
    kept: Sequence[States],
    blocks: Sequence[Collection[int]],
    value_of: LossOf,
    *,
    without: Collection[int] = (),
) -> Tensor:
    """`value_of` the network without each of `blocks` besides `without`, a block at a time: [blocks, micro-batches].

    kept: what `forward_kept` gave for these batches and `without`. No layer before a block's first runs again: the
    stage that holds it starts from what was kept, and what the stages before it send is never read. A value is one
    number; before the last pipeline stage it is zero. Collective over the model's ranks.
    """

    def forward(chunk: Any, batch: MicroBatch, index: int) -> Tensor:
        block, first = blocks[index // len(batches)], min(blocks[index // len(batches)])
        rest = {at: layer for at, layer in _layers(chunk, (*without, *block)).items() if at > first}
        if first in _layers(chunk):
            rest = {first: _Recall(kept[index % len(batches)][first])} | rest
        return _through(chunk, batch, rest)

    def last(chunk: Any, batch: MicroBatch, index: int, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
        return value_of(chunk, hidden, batch, index % len(batches))

    values = _collect(model, [*batches] * len(blocks), last, forward)
    if not values:
        return torch.zeros(len(blocks), len(batches), device=batches[0].tokens.device)
    return torch.stack(values).view(len(blocks), len(batches))


def windows(batches: Sequence[Any], pp: int, rounds: int = 4) -> list[Sequence[Any]]:
    """Cuts micro-batches into runs of about `rounds * pp`, never fewer than `pp` while there are as many, and of
    multiples of `pp` where all of them are: enough to fill the pipeline, few enough to keep what a run leaves behind.
    """
    size = rounds * pp
    cuts = list(range(0, max(len(batches) - pp, 0) + 1, size))
    return [batches[a:b] for a, b in zip(cuts, [*cuts[1:], len(batches)], strict=True)]


class _Recall(nn.Module):
    """Stands where a layer did and gives the states that were kept, whatever enters it."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: Any) -> tuple[Tensor, None]:
        return self.states.detach(), None  # another object: mcore may empty what it has sent


def _keep(
    states: dict[int, Tensor], layer: Any, args: Any, inputs: Mapping[str, Any], outputs: tuple[Any, ...]
) -> None:
    """A layer's hook: stores what enters and what leaves it."""
    at = layer.layer_number - 1
    states[at], states[at + 1] = inputs["hidden_states"].detach(), outputs[0].detach()


def _layers(chunk: Any, without: Collection[int] = ()) -> dict[int, Any]:
    """The layers of a chunk by their number in the whole model, from 0, but for some."""
    numbered = {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
    return {at: layer for at, layer in numbered.items() if at not in without}


def _through(chunk: Any, batch: MicroBatch, layers: Mapping[int, nn.Module]) -> Tensor:
    """A chunk's output with these layers in the place of its own."""
    whole = chunk.decoder.layers
    chunk.decoder.layers = nn.ModuleList(layers.values())
    try:
        return run_chunk(chunk, batch)
    finally:
        chunk.decoder.layers = whole


def run_chunk(chunk: Any, batch: MicroBatch, index: int = 0) -> Tensor:
    """Run a chunk by itself, up to its last layer and the final norm that it may have."""
    return final_hidden(chunk, batch.tokens, getattr(batch, "beside", None))


def _hidden(chunk: Any, batch: MicroBatch, index: int, hidden: Tensor, non_loss_data: bool = True) -> Tensor:
    return hidden


def _collect(model: Any, batches: Sequence[MicroBatch], last: Callable[..., Tensor], forward: Forward) -> list[Tensor]:
    """What `last` makes of each micro-batch's final hidden states, without gradients."""
    with torch.no_grad():
        return _run(model, batches, last, forward, forward_only=True, collect_non_loss_data=True)


def _run(
    model: Any, batches: Sequence[MicroBatch], last: Callable[..., Any], forward: Forward, **options: Any
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    def step(iterator: Indexed, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
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


def _check_interleaving(chunks: Sequence[Any], micro_batches: int) -> None:
    """Raises TopologyError where mcore would, whose words name nothing that can be set."""
    pp, group = chunks[0].config.pipeline_model_parallel_size, chunks[0].config.microbatch_group_size_per_vp_stage
    if len(chunks) > 1 and (micro_batches < group or 0 < micro_batches % group < pp):
        raise TopologyError(
            f"{micro_batches} micro-batches cannot be interleaved over pp={pp} (vp={len(chunks)}). Give each "
            f"data-parallel rank a multiple of {group} (global_batch or samples over micro_batch x dp), or set vp to 1."
        )
