"""Windows of micro-batches, and the number of micro-batches that interleaving requires."""

from __future__ import annotations

import pytest

from minitron_megatron.errors import TopologyError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial, forward_only, windows
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.tiny import samples, share

SHAPE = Shape(layers=4, hidden=16, ffn=16, heads=2, kv_groups=2, head_dim=8, vocab=131)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_windows_hold_every_batch_once_and_are_whole_rounds_where_all_are(pp: int) -> None:
    for count in range(1, 60):
        cut = windows(range(count), pp)
        assert [batch for window in cut for batch in window] == list(range(count))
        assert all(min(pp, count) <= len(window) < 5 * pp for window in cut)
        if count % pp == 0:
            assert all(len(window) % pp == 0 for window in cut)


def run(topology: Topology, count: int) -> str:
    """Return the error of this rank for `count` micro-batches of one sample."""
    model = build(ModelConfig(SHAPE), topology)
    fill_initial(model, topology, 1)
    try:
        forward_only(model, share(samples(count), topology, micro_batch=1))
    except TopologyError as error:
        return str(error)
    return ""


def test_interleaving_says_how_many_micro_batches_it_needs(pool: Pool) -> None:
    message = "3 micro-batches cannot be interleaved over pp=2 (vp=2). Give each data-parallel rank a multiple of 2"
    assert all(error.startswith(message) for error in pool.run(run, 3, pp=2, vp=2))
    assert pool.run(run, 4, pp=2, vp=2) == ["", ""]
    assert pool.run(run, 3, pp=2) == ["", ""]
