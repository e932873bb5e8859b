"""Second moments against z' z, of which each rank adds up half of its rows."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.parallel import Topology
from minitron_megatron.refit.moments import MOMENT_ROWS, Moments
from minitron_megatron.testing import Pool

SIZES = (1, 5, MOMENT_ROWS, MOMENT_ROWS + 1, 2 * MOMENT_ROWS, 5 * MOMENT_ROWS - 3)


def worst(topology: Topology) -> float:
    """Largest difference from all products at once, over sizes and both kinds of tokens."""
    found = []
    for size in SIZES:
        drawn, moments = torch.Generator().manual_seed(size), Moments(size, topology)
        kept = Moments(size, topology)
        for _ in range(2 // topology.dp):
            vectors = torch.randn(50, size, generator=drawn, dtype=torch.float64)
            kinds = torch.randint(-1, 2, (50,), generator=drawn)
            moments.add(vectors, kinds.to(torch.int8))
            kept.add(vectors, kinds.to(torch.int8))
        sums, tokens = moments.total()
        drawn.manual_seed(size)
        want = torch.zeros_like(sums)
        for _ in range(2 // topology.dp):
            vectors = torch.randn(50, size, generator=drawn, dtype=torch.float64)
            kinds = torch.randint(-1, 2, (50,), generator=drawn)
            want += topology.dp * torch.stack([vectors[kinds == place].T @ vectors[kinds == place] for place in (0, 1)])
        found += [float((each - want).abs().max()) for each in (sums, kept.blocks.joined(kept.part()))]
        assert tokens.sum() > 50
    return max(found)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 4}, {"dp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_half_of_a_symmetric_matrix_is_enough(pool: Pool, layout: dict[str, int]) -> None:
    assert max(pool.run(worst, **layout)) < 1e-10
