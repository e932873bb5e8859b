"""Second moments of a teacher's own inputs, which refits of several of its cuts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..data import Batch
from ..layout import Shape, lookup
from ..model import Model, chunks_of, evaluating, run_layer, shape_of
from ..parallel import Topology, fail_together, move
from .moments import Blocks, Moments, unshard
from .streams import Stream, Work

__all__ = ["SITES", "Method", "SharedMoments", "cut_sites", "known_sites", "shared_sites"]

SITES = {"proj": "self_attention.linear_proj.weight", "fc2": "mlp.linear_fc2.weight"}
"""Point of a layer -> the output projection that reads it, within the layer."""


Method = Literal["outputs", "sequential"]
"""`outputs`: each layer alone, fed with the teacher's states. `sequential`: each layer is fed with the student's own
states so far and aims at the teacher's, which makes up for earlier errors and for dropped layers."""


def known_sites(method: Method, teacher: Shape, student: Shape) -> set[str]:
    """Points at which a refit feeds the student's layers with the teacher's states, less the units that were cut.

    Never with `sequential`, or where hidden channels were cut, since norms then give something else. Where heads were
    cut the MLP reads another attention's output, and with experts the router may choose others: attention's alone.
    """
    if method == "sequential" or student.hidden < teacher.hidden:
        return set()
    return {"proj"} if "proj" in cut_sites(teacher, student) or teacher.experts else {"proj", "fc2"}


def cut_sites(teacher: Shape, student: Shape) -> set[str]:
    """Points at which units were cut."""
    attention = (student.heads, student.kv_groups) != (teacher.heads, teacher.kv_groups)
    return {point for point, cut in (("proj", attention), ("fc2", student.ffn < teacher.ffn)) if cut}


def shared_sites(method: Method, teacher: Shape, students: Sequence[Shape]) -> tuple[str, ...]:
    """Points whose moments two or more of the refits can share."""
    used = [known_sites(method, teacher, student) & cut_sites(teacher, student) for student in students]
    return tuple(point for point in SITES if sum(point in points for points in used) > 1)


class SharedMoments:
    """Second moments of what enters a teacher's output projections, in host memory: fp64, 16 bytes per entry.

    The ranks of tp and dp of a stage keep a part of each matrix of its layers.
    """

    @torch.no_grad()
    def __init__(self, teacher: Model, batches: Sequence[Batch], topology: Topology, points: Sequence[str]) -> None:
        """points: of `SITES`. Collective over the world."""
        chunks = chunks_of(teacher)
        self.topology, self.points, self.shape = topology, tuple(points), shape_of(chunks[0])
        self.parts: dict[tuple[int, str], Tensor] = {}
        with fail_together():
            self.work = Work([], chunks, batches, topology)
        self.tokens = self.work.counted()
        with evaluating(chunks):
            _, states = self.work.begin()
            stage = 0
            for number in range(self.shape.layers):
                home = topology.stage_of(number, self.shape.layers)
                states, stage = self.work.passed_on(states, self.shape.hidden, stage, home), home
                with fail_together():
                    if topology.pp_rank == home:
                        states = self._layer(number, states)

    def _layer(self, number: int, stream: Stream) -> Stream:
        """Keep the moments of a layer; returns the states after it."""
        after, moments = [], {point: Moments(self._size(point), self.topology) for point in self.points}
        layer, sizes = self.work.teacher_layers[number], self.shape.sizes()
        for states, arguments, kind in zip(stream, self.work.arguments, self.work.kinds, strict=True):
            seen = run_layer(layer, arguments, self.work.here(states), (*self.points, "out"))
            for point, sums in moments.items():
                whole = unshard(seen[point].flatten(0, 1), 1, lookup(_name(number, point)), 1, sizes, self.topology)
                sums.add(whole.float(), kind)
            after.append(self.work.kept(seen["out"]))
        self.parts.update({(number, point): sums.part() for point, sums in moments.items()})
        return after

    def _size(self, point: str) -> int:
        return lookup(_name(0, point)).shape(self.shape.sizes())[1]

    def at(self, layer: int, point: str, stage: int) -> Tensor | None:
        """The moments of a teacher's layer on pipeline stage `stage`: fp64 [2, size, size]; None on the others.

        Collective over that stage and the layer's own.
        """
        blocks, topology = Blocks(self._size(point), self.topology), self.topology
        home, part = topology.stage_of(layer, self.shape.layers), self.parts.get((layer, point))
        source, target = self.work.same_place(home), self.work.same_place(stage)
        sent = None if part is None else part.to(topology.device)
        moved = move(sent, (blocks.kept, 2, blocks.size), torch.float64, topology.device, source, target)
        return None if moved is None else blocks.joined(moved)


def _name(layer: int, point: str) -> str:
    return f"decoder.layers.{layer}.{SITES[point]}"
