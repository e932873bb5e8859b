"""Second moments of activations, complete over the ranks of every parallelism."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..layout import Param
from ..parallel import Topology, all_reduce, gather_sequence

__all__ = ["MOMENT_ROWS", "MOMENT_TOKENS", "Blocks", "Moments", "share_of", "unshard"]

MOMENT_TOKENS = 4096
"""Tokens that are added at a time: an fp64 copy of so many vectors exists."""

MOMENT_ROWS = 64
"""Rows that are added at a time."""


def share_of(size: int, part: int, parts: int) -> range:
    """The part of `size` rows that one of `parts` ranks takes: equal lengths but for the last ones."""
    each = -(-size // parts)
    return range(min(part * each, size), min((part + 1) * each, size))


class Blocks:
    """The places where the numbers of a symmetric matrix are added up.

    Each tensor-parallel rank has its part of the rows. A block of rows adds up the columns of its own and of the half
    of all blocks that follows, past the last one from the first one on: all ranks do as much.
    """

    def __init__(self, size: int, topology: Topology) -> None:
        self.size, self.topology = size, topology
        parts = [share_of(size, rank, topology.tp) for rank in range(topology.tp)]
        self.rows = parts[topology.tp_rank]
        self.edges = [*(start for rows in parts for start in rows[::MOMENT_ROWS]), size]
        self.half = (len(self.edges) + 1) // 2
        """Blocks of columns that a block of rows adds up."""
        self.each = -(-size // topology.tp)
        """Rows of the fullest rank."""
        self.kept = -(-self.each // topology.dp)
        """Rows of a `part`."""

    def whole(self, sums: Tensor) -> Tensor:
        """This rank's rows, [2, rows, size], which may change -> the matrices: [2, size, size]. Collective over tp."""
        return self._mirrored(sums if self.topology.tp == 1 else self._gathered(self._padded(sums)))

    def part(self, sums: Tensor) -> Tensor:
        """This rank's rows, equal over dp -> what it keeps of them in host memory: [kept, 2, size]."""
        first = self.topology.dp_rank * self.kept
        mine = sums[:, first : first + self.kept].transpose(0, 1).cpu()
        lacking = self.kept - len(mine)
        return torch.cat([mine, mine.new_zeros(lacking, 2, self.size)]) if lacking else mine.contiguous()

    def joined(self, part: Tensor) -> Tensor:
        """The matrices that `part` is of, which is filled in where it is all of them: [2, size, size]. Collective over
        tp and dp."""
        mine = part.to(self.topology.device)
        mine = gather_sequence(mine, self.topology.dp_group) if self.topology.dp > 1 else mine
        return self._mirrored(self._gathered(mine[: self.each]))

    def following(self, block: int, count: int) -> list[slice]:
        """The columns of so many blocks, in a circle."""
        blocks = len(self.edges) - 1
        first = block % blocks
        last = first + count
        if last <= blocks:
            return [slice(self.edges[first], self.edges[last])]
        return [slice(self.edges[first], self.size), slice(0, self.edges[last - blocks])]

    def _padded(self, sums: Tensor) -> Tensor:
        """[2, this rank's rows, size] -> [each, 2, size]."""
        padded = sums.new_zeros(self.each, 2, self.size)
        padded[: len(self.rows)] = sums.transpose(0, 1)
        return padded

    def _gathered(self, padded: Tensor) -> Tensor:
        """The rows of all tensor-parallel ranks: [2, size, size]. Collective over tp."""
        every = gather_sequence(padded, self.topology.tp_group) if self.topology.tp > 1 else padded
        return every[: self.size].transpose(0, 1)

    def _mirrored(self, sums: Tensor) -> Tensor:
        """The matrices, with the half that was not added up."""
        for block, (start, stop) in enumerate(pairwise(self.edges)):
            for columns in self.following(block + self.half, len(self.edges) - 1 - self.half):
                sums[:, start:stop, columns] = sums[:, columns, start:stop].mT
        return sums


class Moments:
    """Sums of z z' over tokens, z = (target, input), apart for calibration tokens and held-out ones: fp64. Each
    tensor-parallel rank adds up its part from whole vectors, which all of them have."""

    def __init__(self, size: int, topology: Topology) -> None:
        self.blocks, self.topology = Blocks(size, topology), topology
        self.sums = torch.zeros(2, len(self.blocks.rows), size, dtype=torch.float64, device=topology.device)
        self.tokens = torch.zeros(2, dtype=torch.float64, device=topology.device)

    def add(self, vectors: Tensor, kind: Tensor) -> None:
        """vectors: [tokens, size]; kind: int8 [tokens], the place of each in the sums, or -1: it does not count."""
        blocks = self.blocks
        for place in (0, 1):
            chosen = (kind == place).nonzero().flatten()
            self.tokens[place] += len(chosen)
            for some in chosen.split(MOMENT_TOKENS):
                z = vectors[some].double()
                for block, (start, stop) in enumerate(pairwise(blocks.edges)):
                    if start in blocks.rows:
                        mine = self.sums[place, start - blocks.rows.start : stop - blocks.rows.start]
                        for columns in blocks.following(block, blocks.half):
                            mine[:, columns].addmm_(z[:, start:stop].T, z[:, columns])

    def total(self) -> tuple[Tensor, Tensor]:
        """(the whole matrix of all tokens: fp64 [2, size, size], tokens: fp64 [2]). Collective over tp and dp."""
        return self.blocks.whole(self._summed()), all_reduce(self.tokens, self.topology.dp_group)

    def part(self) -> Tensor:
        """This rank's part of the sums of all tokens, as `Blocks.joined` takes it. Collective over dp."""
        return self.blocks.part(self._summed())

    def _summed(self) -> Tensor:
        return all_reduce(self.sums, self.topology.dp_group)


def unshard(tensor: Tensor, axis: int, param: Param, dim: int, sizes: dict[str, int], topology: Topology) -> Tensor:
    """Return a tensor whose `axis` holds this rank's rows of a parameter's dim, with the rows of all ranks in order.

    Collective over tp where the dim is split.
    """
    if param.tp_dim != dim or topology.tp == 1:
        return tensor
    parts = gather_sequence(tensor.movedim(axis, 0), topology.tp_group)
    order = torch.cat([param.shard_rows(dim, sizes, rank, topology.tp) for rank in range(topology.tp)])
    if len(order) != len(parts):  # a vocabulary with somebody else's padding lies in the order of the ranks
        return parts.movedim(0, axis)
    whole = torch.empty_like(parts)
    whole[order.to(parts.device)] = parts
    return whole.movedim(0, axis)
