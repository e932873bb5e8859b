"""Bytes that a step of training holds besides weights, gradients and optimizer."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from minitron_megatron.convert import load_hf
from minitron_megatron.model import Checkpoints
from minitron_megatron.model.checkpoint import _sharded
from minitron_megatron.parallel import Topology, keep_own_states
from minitron_megatron.testing import Pool, live_peak
from minitron_megatron.train import Training
from minitron_megatron.train.learner import Learner


def learning(topology: Topology, folder: Path) -> Learner:
    return Learner(load_hf(folder, topology), Training(steps=1, warmup_steps=0), topology)


def finiteness(topology: Topology, folder: Path) -> tuple[list[bool], int, int]:
    """Return (answers for gradients that are finite, infinite and NaN; peak bytes of the check; bytes of the
    gradients)."""
    learner = learning(topology, folder)
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


def states(topology: Topology, folder: Path, out: Path) -> tuple[int, int, int, int]:
    """Check that mcore sees no difference between the ranks; return (peak bytes of saving, bytes of the optimizer
    states that loading asks for, parameters, those of the tensors that this rank has a part of)."""
    from megatron.core.dist_checkpointing import validation

    learner = learning(topology, folder)
    parts = getattr(learner.optimizer, "chained_optimizers", [learner.optimizer])
    for part in parts:
        part._init_optimizer_states_with_dummy_values()
    with patch.object(validation.logger, "warning") as warning:
        peak = live_peak(Checkpoints(out, topology).save, 1, [learner.trainee], {})
    assert not warning.called
    wanted = _sharded(learner.trainee, is_loading=True)["optimizer"]
    keep_own_states(learner.optimizer, wanted)
    asked = [tensor.data.nbytes for of_one in wanted["param_state"].values() for tensor in of_one.values()]
    parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
    own = [each.numel() for each in parameters if any(each in part.model_param_group_index_map for part in parts)]
    learner.release()
    return peak, sum(asked), sum(each.numel() for each in parameters), sum(own)


def test_one_rank_alone_gathers_the_optimizer_states_and_none_reads_all_of_them(
    pool: Pool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """States are 12 bytes a parameter. The first of two ranks gathers them to write them, as it must; the other one
    copies its half. Each loads its half, and the rest of the few tensors that both have a part of."""
    ranks = pool.run(states, checkpoints["untied"], tmp_path, dp=2)
    assert ranks[0][0] > 12 * ranks[0][2]
    assert ranks[1][0] < 6.5 * ranks[1][2]
    for _, asked, parameters, own in ranks:
        assert asked == 12 * own < 0.8 * 12 * parameters
