"""A refit works on a GPTModel that somebody else built, with mcore's own norms or those inside of linear layers."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.layout import Shape
from minitron_megatron.model import named_shards, shape_of
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim
from minitron_megatron.refit import SiteFit, refit
from minitron_megatron.testing import Pool
from tests.prune.test_own_model import their_model
from tests.tiny import samples, share


def twins(topology: Topology) -> list[list[SiteFit]]:
    """The same weights under mcore's local names and under Transformer Engine's, refitted."""
    weights: dict[str, torch.Tensor] = {}
    found = []
    for fused in (False, True):
        models = [their_model(topology, fused), their_model(topology, fused)]
        for model in models:
            for shard in named_shards(model):
                place = f"{shard.name} {topology.tp_rank}" if "linear" in shard.name else shard.name
                torch.manual_seed(sum(place.encode()))
                if "layernorm" in shard.name:
                    weights.setdefault(shard.name, 0.5 + torch.rand(shard.tensor.shape))
                weights.setdefault(shard.name, 0.15 * torch.randn(shard.tensor.shape))
                shard.tensor.data.copy_(weights[shard.name])
        shape: Shape = shape_of(models[0])
        plan = random_plan(shape, 1, hidden=32, ffn=40, heads=4)
        student = trim(models[0], plan, topology)
        found.append(refit(student, models[1], plan, share(samples(24), topology, 8), topology))
    return found


def test_their_models_are_refitted_alike(pool: Pool) -> None:
    local, fused = pool.run(twins, tp=2)[0]
    assert [fit.name for fit in local] == [fit.name for fit in fused]
    assert len(local) == 3 * 4 + 1 and sum(fit.ridge is not None for fit in local) > 6
    for one, other in zip(local, fused, strict=True):
        assert one.ridge == other.ridge
        assert one.held_out == pytest.approx(other.held_out, rel=1e-4)
