"""Whole weights of linear layers, their repair, and the way back into the shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError
from ..layout import Shape, expert_of, kept_rows, lookup
from ..model import NamedShard, adopt, named_shards
from ..parallel import Topology, all_reduce, gather_sequence
from ..records import Plan
from .moments import share_of, unshard
from .solve import Problem, solve

__all__ = ["SiteFit", "Weights"]


@dataclass(frozen=True)
class SiteFit:
    """Repair of one linear layer. An error is the mean over tokens of the squared distance to the target."""

    name: str
    """Parameter of the student."""
    ridge: float | None
    """Strength that was chosen; None where the trimmed weights stay."""
    tokens: int
    """Calibration tokens, the held-out ones included."""
    calibration: tuple[float, float]
    """Error before and after, on the tokens that were fitted."""
    held_out: tuple[float, float]
    """Error before and after, on the tokens that chose the strength."""


class Weights:
    """The linear layers of student and teacher that live on this rank's pipeline stage."""

    def __init__(
        self, student: Sequence[Any], teacher: Sequence[Any], plan: Plan, topology: Topology, ridges: Sequence[float]
    ) -> None:
        self.plan, self.topology, self.ridges = plan, topology, ridges
        self.shards = {"student": _shards(student), "teacher": _shards(teacher)}
        self.shapes: dict[str, Shape] = {"student": plan.target, "teacher": plan.shape}
        self.fits: list[SiteFit] = []

    def whole(self, whose: str, name: str) -> Tensor:
        """A parameter with the rows and columns of all tensor-parallel ranks. Collective over tp."""
        tensor, param = self.shards[whose][name].tensor.detach(), lookup(name)
        for dim in range(tensor.dim()):
            tensor = unshard(tensor, dim, param, dim, self.shapes[whose].sizes(), self.topology)
        return tensor

    def experts(self, whose: str, layer: int, leaf: str) -> Tensor:
        """The weights of all experts of a layer: [experts, rows, columns]. Collective over ep."""
        count = self.shapes[whose].experts
        names = (f"decoder.layers.{layer}.mlp.experts.local_experts.{each}.{leaf}.weight" for each in range(count))
        mine = torch.stack([self.shards[whose][name].tensor.detach() for name in names if name in self.shards[whose]])
        return gather_sequence(mine, self.topology.ep_group) if self.topology.ep > 1 else mine

    def kept(self, target: Tensor, name: str, source: int | None) -> Tensor:
        """The rows of a teacher's whole weight that the student has. name: of the student's parameter."""
        param, sizes, expert = lookup(name), self.plan.shape.sizes(), expert_of(name)
        if expert is not None:
            expert = self.plan.kept_at("experts", source)[expert]
        rows = kept_rows(param, 0, sizes, self.plan.keep_at(source), expert)
        return target if len(rows) == param.shape(sizes)[0] else target[rows.to(target.device)]

    def fit_to_outputs(self, name: str, target: Tensor, sums: Tensor, tokens: Tensor, present: Tensor) -> None:
        """Fit a layer to the outputs of the teacher's. Collective over tp and dp.

        sums: moments of (the teacher's input, the student's); target: the teacher's weight, rows as the student has
        them; present: the student's whole weight.
        """
        split, rows = target.shape[1], self._rows(len(present))
        teachers, between, gram = sums[:, :split, :split], sums[:, :split, split:], sums[:, split:, split:]
        want, have = target[rows].double(), present[rows].double()
        cross = want @ between - have @ gram
        square = ((want @ teachers) * want).flatten(1).sum(1) - (cross * have).flatten(1).sum(1)
        square -= ((want @ between) * have).flatten(1).sum(1)
        self._fit(name, Problem(gram, cross, square.clamp(min=0)), tokens, present)

    def fit_to_residuals(self, name: str, sums: Tensor, tokens: Tensor, present: Tensor) -> None:
        """Fit a layer to what its output lacks. Collective over tp and dp.

        sums: moments of (target - output, input); present: the student's whole weight.
        """
        split, rows = len(present), self._rows(len(present))
        cross, gram = sums[:, :split, split:][:, rows], sums[:, split:, split:]
        square = sums[:, :split, :split].diagonal(dim1=1, dim2=2)[:, rows].sum(1)
        self._fit(name, Problem(gram, cross, square), tokens, present)

    def _rows(self, size: int) -> slice:
        """The rows that this rank solves for, of the tensor- and data-parallel ranks of its stage."""
        topology = self.topology
        share = share_of(size, topology.dp_rank * topology.tp + topology.tp_rank, topology.dp * topology.tp)
        return slice(share.start, share.stop)

    def _fit(self, name: str, problem: Problem, tokens: Tensor, present: Tensor) -> None:
        finite = bool(problem.gram.isfinite().all()) and math.isfinite(float(self._total(problem.square.sum())))
        if not finite:
            raise PlanError(
                f"activations at {name} are not finite (NaN or infinite). Look for broken weights in the teacher, or "
                "run the refit in float32."
            )
        solution = solve(problem, self.ridges, self._total)
        before, after = (_per_token(errors, tokens) for errors in (solution.before, solution.after))
        pairs = list(zip(before, after, strict=True))
        self.fits.append(SiteFit(name, solution.ridge, int(tokens.sum()), pairs[0], pairs[1]))
        if solution.step is not None:
            mine = (present[self._rows(len(present))].double() + solution.step).to(present.dtype)
            self._place(name, self._gathered(mine, len(present)))

    def _total(self, numbers: Tensor) -> Tensor:
        return all_reduce(all_reduce(numbers, self.topology.tp_group), self.topology.dp_group)

    def _gathered(self, mine: Tensor, size: int) -> Tensor:
        """The rows of all ranks, in order."""
        topology = self.topology
        padded = mine.new_zeros(-(-size // (topology.tp * topology.dp)), *mine.shape[1:])
        padded[: len(mine)] = mine
        for group, ranks in ((topology.tp_group, topology.tp), (topology.dp_group, topology.dp)):
            padded = gather_sequence(padded, group) if ranks > 1 else padded
        return padded[:size]

    def _place(self, name: str, whole: Tensor) -> None:
        """Put this rank's part of a weight in its place."""
        shard = self.shards["student"].get(name)
        if shard is None:  # an expert of another rank
            return
        param, sizes, there = lookup(name), self.plan.target.sizes(), shard.tensor.shape
        for dim in range(whole.dim()):
            rows = param.shard_rows(dim, sizes, self.topology.tp_rank, self.topology.tp)
            if len(rows) != there[dim]:  # somebody else's padding of the vocabulary
                rows = torch.arange(there[dim]) + there[dim] * self.topology.tp_rank
            whole = whole.index_select(dim, rows.to(whole.device))
        adopt(shard, whole)


def _shards(model: Sequence[Any]) -> dict[str, NamedShard]:
    return {shard.name: shard for shard in named_shards(model) if not shard.second_home}


def _per_token(errors: Tensor, tokens: Tensor) -> tuple[float, float]:
    calibration, held_out = (errors / tokens.clamp(min=1)).tolist()
    return calibration, held_out
