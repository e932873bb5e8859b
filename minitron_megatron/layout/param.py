"""A parameter is its dims; a dim is a product of words; `(a + b)` is concatenation.

    "kv_group (q + k + v) head_dim"   for each kv_group: its query heads, then its key, then its value
    "(gate + up) ffn"                 all gate rows, then all up rows

A word that has a size is an axis. Any other word is a role, of length one: it names rows, and is never pruned.
The grammar, with product binding closer than sum:  sum = product {"+" product};  product = {word | "(" sum ")"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Axis", "Param", "coords"]

WORD = re.compile(r"[a-z_]+")
ABSENT = -1
"""The coordinate of a row on an axis that does not reach it (a key row has no query head)."""


@dataclass(frozen=True)
class Axis:
    """A named direction of the model and its size, in units (channels, neurons, heads)."""

    name: str
    size: int


class _Node(NamedTuple):
    kind: str  # "word", "sum" or "product"
    word: str = ""
    kids: tuple[_Node, ...] = ()


@cache
def parse(dim: str) -> _Node:
    """The tree of a dim; raises ValueError on text outside the grammar."""
    tokens = re.findall(rf"{WORD.pattern}|\S", dim)

    def total() -> _Node:
        terms = [product()]
        while tokens and tokens[0] == "+":
            tokens.pop(0)
            terms.append(product())
        return terms[0] if len(terms) == 1 else _Node("sum", kids=tuple(terms))

    def product() -> _Node:
        factors = []
        while tokens and tokens[0] not in "+)":
            factors.append(factor(tokens.pop(0)))
        if not factors:
            raise ValueError(f"dim {dim!r}: a word is missing")
        return factors[0] if len(factors) == 1 else _Node("product", kids=tuple(factors))

    def factor(token: str) -> _Node:
        if token == "(":
            inside = total()
            if not tokens or tokens.pop(0) != ")":
                raise ValueError(f"dim {dim!r}: a bracket is not closed")
            return inside
        if not WORD.fullmatch(token):
            raise ValueError(f"dim {dim!r}: {token!r} is not a word")
        return _Node("word", word=token)

    tree = total()
    if tokens:
        raise ValueError(f"dim {dim!r}: {tokens[0]!r} does not belong here")
    return tree


def words(dim: str) -> tuple[str, ...]:
    """The words of a dim, in order."""
    return tuple(WORD.findall(dim))


def coords(dim: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """For every word of `dim`, the coordinate of each row on it: int64 [rows], -1 where the word does not reach.

    Axes take their length from `sizes`; roles have length one. This is the one place where a fused layout is unfolded.
    """
    return _coords(dim, tuple((word, sizes[word]) for word in dict.fromkeys(words(dim)) if word in sizes))


@cache
def _coords(dim: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, Tensor]:
    return _unfold(parse(dim), dict(sizes))


def _unfold(node: _Node, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    if node.kind == "word":
        return {node.word: torch.arange(sizes.get(node.word, 1))}
    parts = [_unfold(kid, sizes) for kid in node.kids]
    rows = [_rows(part) for part in parts]
    if node.kind == "sum":
        names = dict.fromkeys(name for part in parts for name in part)
        return {
            name: torch.cat([part.get(name, torch.full((n,), ABSENT)) for part, n in zip(parts, rows, strict=True)])
            for name in names
        }
    out: dict[str, Tensor] = {}
    for i, part in enumerate(parts):  # row-major: the last factor runs fastest
        left, right = _product(rows[:i]), _product(rows[i + 1 :])
        for name, at in part.items():
            out[name] = at.repeat_interleave(right).repeat(left)
    return out


def _rows(part: Mapping[str, Tensor]) -> int:
    return len(next(iter(part.values())))


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _length(node: _Node, sizes: Mapping[str, int]) -> int:
    """Rows of a dim, without unfolding it."""
    if node.kind == "word":
        return sizes.get(node.word, 1)
    lengths = [_length(kid, sizes) for kid in node.kids]
    return sum(lengths) if node.kind == "sum" else _product(lengths)


@dataclass(frozen=True)
class Param:
    """A row of the table: the dims of one parameter, and the axis that tensor parallelism splits (None: replicated)."""

    dims: tuple[str, ...]
    tp: str | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The unsharded shape."""
        return tuple(_length(parse(dim), sizes) for dim in self.dims)

    @property
    def tp_dim(self) -> int | None:
        """The dim that tensor parallelism splits (mcore: `partition_dim`)."""
        if self.tp is None:
            return None
        return next(i for i, dim in enumerate(self.dims) if self.tp in words(dim))

    def stride(self, sizes: Mapping[str, int]) -> int:
        """How many separate runs of the split axis its dim holds (mcore: `partition_stride`)."""
        assert self.tp is not None and self.tp_dim is not None
        at = coords(self.dims[self.tp_dim], sizes)[self.tp]
        at = at[at != ABSENT]
        return 1 + int((at[1:] < at[:-1]).sum())

    def owner(self, dim: int, sizes: Mapping[str, int], world: int) -> Tensor | None:
        """The tensor-parallel rank that holds each row of `dim`: int64 [rows], or None where every rank holds all."""
        if self.tp is None or dim != self.tp_dim or world == 1:
            return None
        return coords(self.dims[dim], sizes)[self.tp] // (sizes[self.tp] // world)

    def shard_rows(self, dim: int, sizes: Mapping[str, int], rank: int, world: int) -> Tensor:
        """The unsharded rows of `dim` that tensor-parallel `rank` of `world` holds, in order: int64 [local rows]."""
        owner = self.owner(dim, sizes, world)
        if owner is None:
            return torch.arange(self.shape(sizes)[dim])
        return (owner == rank).nonzero().flatten()

    def role_rows(self, dim: int, role: str, sizes: Mapping[str, int]) -> Tensor:
        """The rows of `dim` that carry `role` (`q`, `k`, `v`, `gate`, `up`), in order: int64 [rows of the role]."""
        return (coords(self.dims[dim], sizes)[role] != ABSENT).nonzero().flatten()
