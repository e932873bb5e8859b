"""Gradients and optimizer are freed with the model, although mcore's DDP would keep itself and them alive."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from minitron_megatron.convert import load_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Training, train
from tests.tiny import samples, share


def alive_after_training(topology: Topology, folder: Path) -> list[bool]:
    model = load_hf(folder, topology)
    batches = share(samples(8), topology)
    train(model, LMObjective(topology), lambda step: batches, Training(steps=2, warmup_steps=1), topology)
    watched = [weakref.ref(model[0]), weakref.ref(next(model[0].parameters()))]
    assert all(getattr(parameter, "main_grad", None) is None for parameter in model[0].parameters())
    del model
    gc.collect()
    return [reference() is not None for reference in watched]


def test_a_trained_model_can_be_let_go(checkpoints: dict[str, Path], pool: Pool) -> None:
    assert pool.run(alive_after_training, checkpoints["untied"], tp=2) == [[False, False]] * 2
