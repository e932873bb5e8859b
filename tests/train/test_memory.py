"""Bytes that a step of training holds besides weights, gradients and optimizer."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_megatron.convert import load_hf
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool, live_peak
from minitron_megatron.train import Training
from minitron_megatron.train.learner import Learner


def finiteness(topology: Topology, folder: Path) -> tuple[list[bool], int, int]:
    """Return (answers for gradients that are finite, infinite and NaN; peak bytes of the check; bytes of the
    gradients)."""
    learner = Learner(load_hf(folder, topology), Training(steps=1, warmup_steps=0), topology)
    gradients = [buffer.grad_data for chunk in learner.chunks for buffer in chunk.buffers]
    answers, peaks = [], []
    for value in (1e38, -torch.inf, torch.nan):  # a sum of squares would overflow at the first
        gradients[-1][-1] = value if topology.rank == topology.world - 1 else 0.0
        peaks.append(live_peak(lambda: answers.append(learner._finite())))
    learner.release()
    return answers, max(peaks), sum(each.nbytes for each in gradients)


def test_looking_for_gradients_that_are_not_finite_copies_none(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for answers, peak, gradients in pool.run(finiteness, checkpoints["untied"], dp=2):
        assert answers == [True, False, False]
        assert peak < 256 < gradients / 64
