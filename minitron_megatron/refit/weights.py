"""Whole weights of linear layers, their repair, and the way back into the shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError
from ..layout import Shape, expert_of, kept_rows, lookup
from ..model import Chunk, NamedShard, assign, field_of, named_shards
from ..parallel import Topology, all_reduce, gather_sequence
from ..records import Plan
from .moments import share_of, unshard
from .solve import Problem, solve

__all__ = ["SiteFit", "Weights"]


@dataclass(frozen=True)
class SiteFit:
    """Repair of a linear layer or the final norm. Errors: squared distance to the target, mean over tokens."""

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
        self,
        student: Sequence[Chunk],
        teacher: Sequence[Chunk],
        plan: Plan,
        topology: Topology,
        ridges: Sequence[float],
    ) -> None:
        self.plan, self.topology, self.ridges = plan, topology, ridges
        self.shards = {"student": _shards(student), "teacher": _shards(teacher)}
        self.shapes: dict[str, Shape] = {"student": plan.target, "teacher": plan.shape}
        self.zero_centred = field_of(student[0], "zero_centered_norm")
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
        split = target.shape[1]
        parts = sums[:, :split, :split], sums[:, :split, split:], sums[:, split:, split:]
        self._fit_to_outputs(name, target, parts, tokens, present)

    def fit_to_own_inputs(
        self, name: str, target: Tensor, teachers: Tensor, tokens: Tensor, present: Tensor, source: int
    ) -> None:
        """Fit a layer whose input is the teacher's, of the units that stay, to its outputs. Collective over tp and dp.

        teachers: moments of the teacher's input. The rest as of `fit_to_outputs`; source: the layer's number there.
        """
        stays = kept_rows(lookup(name), 1, self.plan.shape.sizes(), self.plan.keep_at(source)).to(teachers.device)
        between = teachers[:, :, stays]
        self._fit_to_outputs(name, target, (teachers, between, between[:, stays]), tokens, present)

    def no_error(self, name: str, tokens: Tensor) -> None:
        """Note that a layer gives what it should, for nothing that it reads was cut."""
        self.fits.append(SiteFit(name, None, int(tokens.sum()), (0.0, 0.0), (0.0, 0.0)))

    def _fit_to_outputs(
        self, name: str, target: Tensor, moments: tuple[Tensor, Tensor, Tensor], tokens: Tensor, present: Tensor
    ) -> None:
        """moments: of the teacher's input, of it with the student's, of the student's."""
        rows, (teachers, between, gram) = self._rows(len(present)), moments
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

    def fit_norm(self, norm: str, output: str, sums: Tensor, tokens: Tensor) -> None:
        """Scale the channels of the final norm where the output layer is the embedding. Collective over tp and dp.

        sums: moments of (the teacher's normed states, the student's), whose logits are to be the teacher's.
        """
        target, present = self.whole("teacher", output), self.whole("student", output)
        split, rows = target.shape[1], self._rows(len(present))
        teachers, between, gram = sums[:, :split, :split], sums[:, :split, split:], sums[:, split:, split:]
        want, have = target[rows].double(), present[rows].double()
        theirs, both, ours = (self._total(one.T @ other) for one, other in ((want, want), (want, have), (have, have)))
        cross = (both * between).sum(1) - (ours * gram).sum(1)
        square = (theirs * teachers).flatten(1).sum(1) - 2 * (both * between).flatten(1).sum(1)
        square += (ours * gram).flatten(1).sum(1)
        problem = Problem(ours * gram, cross[:, None], square.clamp(min=0))
        step = self._solved(norm, problem, tokens, lambda numbers: numbers)
        if step is not None:
            self._scale(norm, 1 + step[0])

    def _scale(self, norm: str, factor: Tensor) -> None:
        """Multiply what a norm gives, channel by channel."""
        centred = int(self.zero_centred)
        for leaf, offset in (("weight", centred), ("bias", 0)):
            shard = self.shards["student"].get(f"{norm.rpartition('.')[0]}.{leaf}")
            if shard is not None:
                value = shard.tensor.detach()
                assign(shard, ((value.double() + offset) * factor - offset).to(value.dtype))

    def _rows(self, size: int) -> slice:
        """The rows that this rank solves for, of the tensor- and data-parallel ranks of its stage."""
        topology = self.topology
        share = share_of(size, topology.dp_rank * topology.tp + topology.tp_rank, topology.dp * topology.tp)
        return slice(share.start, share.stop)

    def _fit(self, name: str, problem: Problem, tokens: Tensor, present: Tensor) -> None:
        step = self._solved(name, problem, tokens, self._total)
        if step is not None:
            mine = (present[self._rows(len(present))].double() + step).to(present.dtype)
            self._place(name, self._gathered(mine, len(present)))

    def _solved(self, name: str, problem: Problem, tokens: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The step for this rank's rows, or None; notes the errors. total: as of `solve`."""
        if not bool(self._total(torch.stack([part.sum() for part in (problem.gram, problem.square)])).isfinite().all()):
            raise PlanError(
                f"activations at {name} are not finite (NaN or infinite). Look for broken weights in the teacher, or "
                "run the refit in float32."
            )
        solution = solve(problem, self.ridges, total)
        before, after = (_per_token(errors, tokens) for errors in (solution.before, solution.after))
        pairs = list(zip(before, after, strict=True))
        self.fits.append(SiteFit(name, solution.ridge, int(tokens.sum()), pairs[0], pairs[1]))
        return solution.step

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
        assign(shard, whole)


def _shards(model: Sequence[Chunk]) -> dict[str, NamedShard]:
    return {shard.name: shard for shard in named_shards(model)}


def _per_token(errors: Tensor, tokens: Tensor) -> tuple[float, float]:
    calibration, held_out = (errors / tokens.clamp(min=1)).tolist()
    return calibration, held_out
