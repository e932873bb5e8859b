"""Dims of a parameter. A dim is a product of words; `(a + b)` is a concatenation.

    "kv_group (q + k + v) head_dim"   for each kv_group: its query heads, then its key, then its value
    "(gate + up) ffn"                 all gate rows, then all up rows

A word with a size is an axis. Any other word is a role of length one: it names rows and is never pruned.
Grammar (a product binds tighter than a sum):  sum = product {"+" product};  product = {word | "(" sum ")"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["Axis", "Param", "coords"]

WORD = re.compile(r"[a-z_]+")
ABSENT = -1
"""Coordinate of a row on an axis that it does not have (a key row has no query head)."""


@dataclass(frozen=True)
class Axis:
    """A named model axis and its size in units (channels, neurons, heads)."""

    name: str
    size: int


class _Node(NamedTuple):
    kind: str  # "word", "sum" or "product"
    word: str = ""
    kids: tuple[_Node, ...] = ()


@cache
def parse(dim: str) -> _Node:
    """Return the syntax tree of a dim. Raises ValueError for text outside the grammar."""
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
    """Return the words of a dim, in order."""
    return tuple(WORD.findall(dim))


class Coordinates(Mapping[str, Int64[Tensor, "rows"]]):
    """Read-only mapping: word -> coordinate of each row. A look-up returns a copy: all callers share what is held."""

    def __init__(self, held: Mapping[str, Int64[Tensor, "rows"]]) -> None:
        self._held = held

    def __getitem__(self, word: str) -> Int64[Tensor, "rows"]:
        return self._held[word].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def coords(dim: str, sizes: Mapping[str, int]) -> Coordinates:
    """Return, for every word of `dim`, the coordinate of each row on it; -1 for a row without that word.

    Axes take their length from `sizes`; roles have length one. No other code unfolds a fused layout.
    """
    return _coords(dim, tuple((word, sizes[word]) for word in dict.fromkeys(words(dim)) if word in sizes))


@cache
def _coords(dim: str, sizes: tuple[tuple[str, int], ...]) -> Coordinates:
    return Coordinates(_unfold(parse(dim), dict(sizes)))


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
    """Return the number of rows of a dim, without unfolding it."""
    if node.kind == "word":
        return sizes.get(node.word, 1)
    lengths = [_length(kid, sizes) for kid in node.kids]
    return sum(lengths) if node.kind == "sum" else _product(lengths)


@dataclass(frozen=True)
class Param:
    """Row of the table: the dims of one parameter, and the axis split by tensor parallelism (None: replicated)."""

    dims: tuple[str, ...]
    tp: str | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the unsharded shape."""
        return tuple(_length(parse(dim), sizes) for dim in self.dims)

    @property
    def tp_dim(self) -> int | None:
        """Dim that tensor parallelism splits (mcore: `partition_dim`); None: replicated."""
        if self.tp is None:
            return None
        return next(i for i, dim in enumerate(self.dims) if self.tp in words(dim))

    def stride(self, sizes: Mapping[str, int]) -> int:
        """Return how many times the split axis is repeated along its dim (mcore: `partition_stride`)."""
        assert self.tp is not None and self.tp_dim is not None
        at = coords(self.dims[self.tp_dim], sizes)[self.tp]
        at = at[at != ABSENT]
        return 1 + int((at[1:] < at[:-1]).sum())

    def owner(self, dim: int, sizes: Mapping[str, int], world: int) -> Int64[Tensor, "rows"] | None:
        """Return the tensor-parallel rank that holds each row of `dim`; None where `dim` is not split."""
        if self.tp is None or dim != self.tp_dim or world == 1:
            return None
        return coords(self.dims[dim], sizes)[self.tp] // (sizes[self.tp] // world)

    def shard_rows(self, dim: int, sizes: Mapping[str, int], rank: int, world: int) -> Int64[Tensor, "local_rows"]:
        """Return the unsharded rows of `dim` that tensor-parallel `rank` of `world` holds."""
        owner = self.owner(dim, sizes, world)
        if owner is None:
            return torch.arange(self.shape(sizes)[dim])
        return (owner == rank).nonzero().flatten()

    def role_rows(self, dim: int, role: str, sizes: Mapping[str, int]) -> Int64[Tensor, "role_rows"]:
        """Return the rows of `dim` that have `role` (`q`, `k`, `v`, `gate`, `up`)."""
        return (coords(self.dims[dim], sizes)[role] != ABSENT).nonzero().flatten()
