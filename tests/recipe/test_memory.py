"""Planned bytes of a rank in training are those that lie in its memory, within a tenth."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.data import Batch
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe.memory import training_bytes
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Training
from minitron_megatron.train.learner import Learner

SHAPE = Shape(layers=4, hidden=256, ffn=512, heads=8, kv_groups=4, head_dim=32, vocab=1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def live_bytes() -> int:
    """Of every tensor's storage that can be reached, each once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def planned_and_held(topology: Topology, dtype: str, world: int) -> tuple[float, int]:
    before = live_bytes()
    model = build(ModelConfig(shape=SHAPE), topology, DTYPES[dtype])
    fill_initial(model, topology, 1)
    learner = Learner(model, Training(steps=2, lr=1e-3, min_lr=1e-4, warmup_steps=0), topology)
    tokens = torch.randint(0, SHAPE.vocab, (1, 17))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, 16, dtype=torch.bool))
    learner.step([batch], LMObjective(topology))
    held = live_bytes() - before
    planned = training_bytes(SHAPE, topology, dtype, world)[topology.pp_rank]
    learner.release()
    return planned, held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_planned_bytes_are_those_held(pool: Pool, layout: dict[str, Any], dtype: str) -> None:
    for planned, held in pool.run(planned_and_held, dtype, 2, **layout):
        assert planned > 4e6
        assert abs(held / planned - 1) < 0.1
