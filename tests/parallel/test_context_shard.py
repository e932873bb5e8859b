"""Context-parallel ranks together hold the whole sequence, and their attention equals attention on one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.errors import RecipeError, TopologyError
from minitron_megatron.model.spec import CoreAttention
from minitron_megatron.parallel import AttentionContext, ContextShard, Topology, independent_replicas
from minitron_megatron.parallel.context_shard import by_rank, in_order
from minitron_megatron.testing import Pool
from tests.tiny import SEQUENCE, samples, share

LENGTH, BATCH = 24, 2


def shard(rank: int, size: int, group: Any = None) -> ContextShard:
    return ContextShard(rank, size, group, LENGTH)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_have_equal_length_and_work_and_make_up_the_whole(size: int) -> None:
    tokens = torch.zeros(BATCH, LENGTH // size, dtype=torch.int64)
    parts = [shard(rank, size).positions(tokens)[0] for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(LENGTH))
    assert {len(part) for part in parts} == {LENGTH // size}
    assert len({int(part.sum()) for part in parts}) == 1  # number of keys that the queries attend to
    assert in_order(torch.cat(parts), size).tolist() == list(range(LENGTH))
    assert by_rank(torch.arange(LENGTH), size).tolist() == torch.cat(parts).tolist()


def test_pieces_are_chunks_cut_by_documents() -> None:
    documents = (torch.arange(LENGTH) >= torch.tensor([[5], [18]])).long()
    assert shard(0, 2).pieces(None) == [[(0, 6, 0), (18, 24, 0)]]
    assert shard(0, 2).pieces(documents) == [[(0, 5, 0), (5, 6, 5), (18, 24, 5)], [(0, 6, 0), (18, 24, 18)]]
    assert shard(1, 2).pieces(documents)[1] == [(6, 12, 0), (12, 18, 0)]


def attend(topology: Topology, separate: bool) -> tuple[Tensor, ...]:
    """Return this rank's output and its part of the three gradients: each [part, batch, heads, head_dim]."""
    query, key, value, documents = inputs()
    own = shard(topology.cp_rank, topology.cp, topology.cp_group)
    context = AttentionContext(documents if separate else None, shard=own)
    parts = [own.take(x.transpose(0, 1)).transpose(0, 1).requires_grad_() for x in (query, key, value)]
    out = CoreAttention(SimpleNamespace(window_size=None))(*parts, context.as_mask())
    (out * weights(own.take(torch.arange(LENGTH)[None])[0])).sum().backward()
    return (out.detach().view(*parts[0].shape), *(part.grad for part in parts if part.grad is not None))


def inputs() -> tuple[Tensor, ...]:
    """Return query, key, value, documents."""
    torch.manual_seed(1)
    shapes = [(LENGTH, BATCH, heads, 8) for heads in (4, 2, 2)]
    documents = (torch.arange(LENGTH)[:, None] >= torch.tensor([5, 18])).long()
    return (*(torch.randn(shape) for shape in shapes), documents.t().contiguous())


def weights(positions: Tensor) -> Tensor:
    return torch.sin(positions.float() + 1)[:, None, None]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_and_its_gradients_are_those_of_the_whole(pool: Pool, size: int, separate: bool) -> None:
    query, key, value, documents = inputs()
    whole = [x.requires_grad_() for x in (query, key, value)]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *(x.repeat_interleave(2, 2) for x in (key, value))))
    mask = torch.ones(LENGTH, LENGTH).tril().bool().expand(BATCH, 1, -1, -1)
    if separate:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    out = F.scaled_dot_product_attention(q, k, v, mask).permute(2, 0, 1, 3)
    (out.reshape(LENGTH, BATCH, -1) * weights(torch.arange(LENGTH))).sum().backward()
    expected = [out.detach(), *(x.grad for x in whole)]
    for rank, found in enumerate(pool.run(attend, separate, dp=size, cp=size)):
        for part, full in zip(found, expected, strict=True):
            assert full is not None
            torch.testing.assert_close(part, shard(rank, size).take(full.transpose(0, 1)).transpose(0, 1))


def places(topology: Topology) -> tuple[Any, ...]:
    tokens = torch.cat([batch.tokens for batch in share(samples(8), topology)])
    return topology.replica, topology.cp_rank, tuple(tokens.shape), tokens[:, 0].tolist()


def test_neighbours_share_sequences_and_replicas_read_their_own(pool: Pool) -> None:
    found = pool.run(places, dp=4, cp=2)
    assert [each[:3] for each in found] == [(rank // 2, rank % 2, (4, SEQUENCE // 2)) for rank in range(4)]
    assert [*found[0][3], *found[2][3]] == samples(8).tokens[:, 0].tolist()


def enter_independent_replicas(topology: Topology) -> None:
    with independent_replicas(topology):
        pass


def cut_short(topology: Topology) -> None:
    batch = samples(2)
    batch.__class__(batch.tokens[:, :6], batch.labels[:, :6], batch.mask[:, :6]).shared(topology)


def test_what_cannot_be_shared_is_refused(pool: Pool) -> None:
    with pytest.raises(TopologyError, match=r"cp=2 .*cannot work independently"):
        pool.run(enter_independent_replicas, dp=2, cp=2)
    with pytest.raises(
        TopologyError,
        match=r"cp=3 needs a multiple of 3 processes, not 2\. Start 3 of them",
    ):
        pool.run(places, dp=2, cp=3)
    with pytest.raises(RecipeError, match=r"sequences of 6 .*multiple of 4"):
        pool.run(cut_short, dp=2, cp=2)
