"""The residual streams of teacher and student, a layer at a time, and teacher layers of other pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import DataError
from ..model import Arguments, Chunk, layer_arguments, layers_of
from ..parallel import Topology, all_reduce, gather_sequence, move

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["Stream", "Work", "token_kinds"]

HELD_OUT_EVERY = 8
"""Every so manyth calibration sample is held out."""

Stream = list[Tensor]
"""States of each micro-batch, [seq (over tp with sequence parallelism), batch, hidden], in host memory."""


class Work:
    """The micro-batches of this rank and the ranks around it."""

    def __init__(
        self, student: Sequence[Chunk], teacher: Sequence[Chunk], batches: Sequence[Batch], topology: Topology
    ):
        self.student, self.teacher, self.batches, self.topology = student, teacher, batches, topology
        self.student_layers, self.teacher_layers = layers_of(student), layers_of(teacher)
        self.kinds = token_kinds(batches, topology)
        self.arguments: list[Arguments] = []

    def counted(self) -> Tensor:
        """Tokens of the calibration and the held-out samples: fp64 [2]. Collective over dp."""
        every = torch.cat(self.kinds)
        mine = torch.stack([(every == place).sum() for place in (0, 1)]).double()
        return all_reduce(mine, self.topology.dp_group)

    def begin(self) -> tuple[Stream, Stream]:
        """Learn the arguments of this rank's layers; returns what enters the first layer of student and teacher, which
        means something on the first pipeline stage alone. Collective over the ranks of a stage."""
        streams: tuple[Stream, Stream] = ([], [])
        models = [
            (chunks[0], stream) for chunks, stream in zip((self.student, self.teacher), streams, strict=True) if chunks
        ]
        for batch in self.batches:
            for chunk, stream in models:
                entering = None if chunk.pre_process else self._zeros(chunk, batch)
                arguments = dict(layer_arguments(chunk, batch, entering))
                stream.append(self.kept(arguments.pop("hidden_states")))
            self.arguments.append(arguments)
        return streams

    def _zeros(self, chunk: Chunk, batch: Batch) -> Tensor:
        samples, sequence = batch.tokens.shape
        sequence //= self.topology.tp if self.topology.sequence_parallel else 1
        dtype = next(chunk.parameters()).dtype
        return torch.zeros(sequence, samples, chunk.config.hidden_size, dtype=dtype, device=self.topology.device)

    def kept(self, states: Tensor) -> Tensor:
        """States where a stream keeps them."""
        return states.detach().cpu()

    def here(self, states: Tensor) -> Tensor:
        """States where a layer takes them."""
        return states.to(self.topology.device)

    def whole(self, states: Tensor) -> Tensor:
        """[positions, batch, channels] of this rank -> [tokens of all positions, channels]. Collective over tp with
        sequence parallelism."""
        if self.topology.sequence_parallel:
            states = gather_sequence(states, self.topology.tp_group)
        return states.flatten(0, 1)

    def passed_on(self, stream: Stream, hidden: int, source: int, target: int) -> Stream:
        """A stream that pipeline stage `source` has, on stage `target`; on the others what they had."""
        if source == target:
            return stream
        here, there = self.same_place(source), self.same_place(target)
        device, out = self.topology.device, []
        for states, batch in zip(stream, self.batches, strict=True):
            shape = (*self._zeros_shape(batch), hidden)
            sent = self.here(states) if self.topology.rank == here else None
            moved = move(sent, shape, states.dtype, device, source=here, target=there)
            out.append(states if moved is None else self.kept(moved))
        return out

    def _zeros_shape(self, batch: Batch) -> tuple[int, int]:
        samples, sequence = batch.tokens.shape
        return sequence // (self.topology.tp if self.topology.sequence_parallel else 1), samples

    def same_place(self, stage: int) -> int:
        """The rank of another pipeline stage at this rank's place."""
        return self.topology.rank_at(stage, self.topology.tp_rank, self.topology.dp_rank)

    @contextmanager
    def teacher_layer(self, number: int, layers: int, stage: int) -> Iterator[TransformerLayer | None]:
        """A layer of the teacher on pipeline stage `stage`, None on the others. Where it lives elsewhere its weights
        stand in the place of a layer's that is there. Collective over the two stages."""
        home, at = self.topology.stage_of(number, layers), self.topology.pp_rank
        if home == stage:
            yield self.teacher_layers[number] if at == stage else None
            return
        if at not in (home, stage):
            yield None
            return
        layer = self.teacher_layers[number] if at == home else next(iter(self.teacher_layers.values()))
        own: list[tuple[nn.Parameter, Tensor]] = []
        for _, parameter in sorted(layer.named_parameters()):
            there = (self.same_place(home), self.same_place(stage))
            found = move(
                parameter.data, parameter.shape, parameter.dtype, self.topology.device, source=there[0], target=there[1]
            )
            if found is not None:
                own.append((parameter, parameter.data))
                parameter.data = found
        try:
            yield layer if at == stage else None
        finally:
            for parameter, data in own:
                parameter.data = data


def token_kinds(batches: Sequence[Batch], topology: Topology) -> list[Tensor]:
    """The place of each token in the sums, position by position as activations lie: int8 [seq * batch] a micro-batch;
    0 calibration, 1 held out, -1 masked. Whole samples are held out, whatever the layout. Raises DataError for one."""
    mine = sum(len(batch.tokens) for batch in batches)
    split = any(batch.attention_context and batch.attention_context.shard for batch in batches)
    ranks = topology.cp if split else 1
    """Ranks that have the same samples."""
    total, number, kinds = mine * topology.dp // ranks, mine * (topology.dp_rank // ranks), []
    if total < 2:
        raise DataError("a refit needs 2 calibration samples at least, for one of them is held out.")
    every = min(HELD_OUT_EVERY, total)
    for batch in batches:
        held = torch.arange(number + 1, number + 1 + len(batch.tokens), device=batch.mask.device) % every == 0
        number += len(batch.tokens)
        kinds.append(torch.where(batch.mask.t(), held.to(torch.int8), -1).flatten())
    return kinds
