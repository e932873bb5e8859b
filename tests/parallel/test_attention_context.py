"""An attention context passes through mcore as its attention mask, also where mcore recomputes activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.model import KVCache
from minitron_megatron.parallel import AttentionContext, ContextShard, Topology
from minitron_megatron.testing import Pool


def test_it_comes_out_of_the_mask_as_it_went_in() -> None:
    context = AttentionContext(torch.zeros(1, 4, dtype=torch.int64))
    assert AttentionContext.of(context.as_mask()) is context
    nothing = AttentionContext.of(None)
    assert (nothing.documents, nothing.cache, nothing.shard) == (None, None, None)


def test_a_mask_of_somebody_else_is_refused() -> None:
    with pytest.raises(AssertionError, match="attention masks are not supported"):
        AttentionContext.of(torch.ones(2, 2, dtype=torch.bool))


def test_positions_are_those_of_the_cache_or_the_shard() -> None:
    tokens, cache = torch.zeros(2, 1, dtype=torch.int64), KVCache(2, 8)
    cache.starts = torch.tensor([3, 5])
    assert AttentionContext(cache=cache).positions(tokens).tolist() == [[3], [5]]  # type: ignore[union-attr]
    shard = ContextShard(0, 2, None, 8)
    assert AttentionContext(shard=shard).positions(tokens.expand(2, 4)).tolist() == [[0, 1, 6, 7]]  # type: ignore[union-attr]
    assert AttentionContext(torch.zeros(2, 1, dtype=torch.int64)).positions(tokens) is None


def recomputed(topology: Topology) -> tuple[int, bool, bool]:
    """Return how often a block ran, whether it always got the same context, and whether an attribute would be lost."""
    from megatron.core.tensor_parallel import checkpoint

    context, seen = AttentionContext(torch.zeros(1, 4, dtype=torch.int64)), []

    def block(states: Tensor, mask: Any) -> Tensor:
        seen.append(AttentionContext.of(mask))
        return states * 2

    checkpoint(block, False, torch.ones(3, requires_grad=True), context.as_mask()).sum().backward()
    plain = torch.empty(0)
    plain.context = context  # type: ignore[attr-defined]
    return len(seen), all(each is context for each in seen), hasattr(plain.detach(), "context")


def test_mcores_recomputation_keeps_it(pool: Pool) -> None:
    assert pool.run(recomputed) == [(2, True, False)]
