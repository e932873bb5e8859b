"""The mean loss is a mean over tokens, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_megatron.convert import load_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, mean_loss
from tests.tiny import LAYOUTS, cross_entropy, each_layout, samples, share, transformer

MANY = 12
"""Micro-batches of one sample: more than one window of any layout."""


def losses(topology: Topology, folder: Path) -> list[tuple[float, int]]:
    """Return the mean losses of the same samples in large and in small micro-batches; neither leaves a gradient."""
    model = load_hf(folder, topology)
    found = []
    for micro_batch in (3, 1):
        batches = share(samples(MANY), topology, micro_batch)
        found.append(mean_loss(model, batches, LMObjective(topology), topology))
    assert all(weight.grad is None for chunk in model for weight in chunk.parameters())
    return found


@each_layout
def test_the_mean_loss_is_the_naive_truth(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    every = samples(MANY)
    with torch.no_grad():
        truth = cross_entropy(transformer(checkpoints["untied"]), every).item()
    for found in pool.run(losses, checkpoints["untied"], **LAYOUTS[layout]):
        for loss, tokens in found:
            assert loss == pytest.approx(truth, rel=1e-5)
            assert tokens == int(every.mask.sum())
