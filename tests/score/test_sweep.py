"""Scores equal those of plain transformers hooks and a few lines of torch, at every layout."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import PlanError
from minitron_megatron.events import Event
from minitron_megatron.model import named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.records import Scores, Statistic
from minitron_megatron.score import block_importance, leave_out, score
from minitron_megatron.testing import Pool
from tests.score.truth import SAMPLES, Seen, activations, expect_truth, truth
from tests.tiny import LAYOUTS, SHAPE, each_layout, samples, share

STATISTICS = [Statistic(batch, sequence) for batch, sequence in product(("l2", "mean", "var"), repeat=2)]
STATISTICS += [Statistic(heads="norm_first"), Statistic("var", "l2", heads="norm_first")]


@pytest.fixture(scope="module")
def seen(checkpoints: dict[str, Path]) -> Seen:
    return activations(checkpoints["untied"], samples(SAMPLES))


# ---- the jobs


def sweep_all(
    topology: Topology, folder: Path, micro_batch: int, out: Path, statistics: list[Statistic]
) -> tuple[list[Scores], list[str]]:
    """Return the scores by each statistic, and the hash of each sweep's file."""
    model, batches = load_hf(folder, topology), share(samples(SAMPLES), topology, micro_batch)
    before = hooks(model)
    found, files = [], []
    for statistic in statistics:
        found.append(score(model, batches, topology=topology, statistic=statistic, model_hash="abc"))
        path = out / f"{topology.rank}"
        found[-1].save(path)
        files.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert hooks(model) == before == 0
    return found, files


def hooks(model: list[Any]) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for chunk in model for m in chunk.modules())


def fail_in_the_middle(topology: Topology, folder: Path) -> int:
    """Return the hooks that stay after an aborted sweep."""
    model = load_hf(folder, topology)

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, share(samples(SAMPLES), topology), topology=topology, listener=stop)
    return hooks(model)


def listen(topology: Topology, folder: Path, axes: list[str], micro_batch: int) -> tuple[Scores, list[Event]]:
    model, events = load_hf(folder, topology), []
    batches = share(samples(SAMPLES), topology, micro_batch)
    return score(model, batches, axes, topology=topology, listener=events.append), events


def two_paddings(topology: Topology, folder: Path) -> tuple[Tensor, Tensor]:
    """Scores of the same samples with different tokens in the padding."""
    model, every = load_hf(folder, topology), samples(SAMPLES)
    other = Batch(torch.where(every.mask, every.tokens, 0), every.labels, every.mask)
    scores = (score(model, share(each, topology), ["ffn"], topology=topology) for each in (every, other))
    a, b = (torch.stack(list(each.values["ffn"].values())) for each in scores)
    return a, b


BREAKS = {
    "self_attention.linear_qkv.weight": "heads",
    "self_attention.linear_proj.weight": "hidden",  # its output is first measured at the norm behind it
    "pre_mlp_layernorm.weight": "hidden",
    "mlp.linear_fc1.weight": "ffn",
}
"""Parameter of layer 1 -> the axis on which its NaN shows first."""


def broken(topology: Topology, folder: Path) -> list[tuple[str, str]]:
    """Return the errors for models with a NaN at the end of a parameter: on one replica's last tp rank, and on all."""
    last, errors = (topology.tp_rank, topology.dp_rank) == (topology.tp - 1, topology.dp - 1), []
    for name in BREAKS:
        for here in (last, True):
            model = load_hf(folder, topology)
            for shard in named_shards(model):
                if shard.name == f"decoder.layers.1.{name}" and here:
                    shard.tensor.data.view(-1)[-1] = torch.nan
            with pytest.raises(PlanError) as caught:
                score(model, share(samples(SAMPLES), topology), topology=topology)
            assert hooks(model) == 0
            errors.append(str(caught.value))
    return list(zip(errors[::2], errors[1::2], strict=True))


def wrapped(topology: Topology, folder: Path) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = load_hf(folder, topology)
    ddp = [DistributedDataParallel(each.config, DistributedDataParallelConfig(), each) for each in model]
    for measure in (score, leave_out, block_importance):
        with pytest.raises(PlanError, match=r"this is a DistributedDataParallel\. Unwrap it: model\.module"):
            measure(ddp, share(samples(SAMPLES), topology), topology=topology)


# ---- the tests


@each_layout
def test_scores_are_the_naive_truth(
    pool: Pool, checkpoints: dict[str, Path], seen: Seen, layout: str, tmp_path: Path
) -> None:
    """All nine statistics, both orders of a head's norm, every axis, samples padded at the end; and the same file from
    every rank, and from a second run of the same layout. Some layouts have three of the statistics."""
    folder, statistics = checkpoints["untied"], STATISTICS if layout in ("tp1", "tp2-pp2") else STATISTICS[::4]
    results = pool.run(sweep_all, folder, 3, tmp_path, statistics, **LAYOUTS[layout])
    found, files = results[0]
    for statistic, scores in zip(statistics, found, strict=True):
        expect_truth(scores, truth(seen, statistic, SHAPE))
        assert (scores.statistic, scores.shape, scores.model_hash) == (statistic, SHAPE, "abc")
        assert (scores.samples, scores.tokens) == (SAMPLES, int(samples(SAMPLES).mask.sum()))
    assert len(set(files)) == len(statistics)
    assert all(other == files for _, other in results)
    for _, again in pool.run(sweep_all, folder, 3, tmp_path, statistics[-1:] * 2, **LAYOUTS[layout]):
        assert again == files[-1:] * 2


@pytest.mark.parametrize("layout", ["tp1", "pp2-vp2"])
def test_micro_batches_and_windows_change_nothing(
    pool: Pool, checkpoints: dict[str, Path], seen: Seen, layout: str
) -> None:
    """Twelve micro-batches are more than one window."""
    (scores, events), *_ = pool.run(listen, checkpoints["untied"], ["heads", "hidden"], 1, **LAYOUTS[layout])
    expected = truth(seen, Statistic(), SHAPE)
    del expected["ffn"]
    expect_truth(scores, {axis: expected[axis] for axis in ("heads", "hidden")})
    assert len(events) > 1
    assert {(event.label, event.total, event.unit) for event in events} == {("score", SAMPLES, "samples")}
    assert events[-1].done == SAMPLES


def test_all_ranks_samples_are_told(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for _, events in pool.run(listen, checkpoints["untied"], ["ffn"], 2, dp=2):
        assert [(event.done, event.total) for event in events] == [(SAMPLES, SAMPLES)]


def test_what_stands_in_the_padding_counts_for_nothing(pool: Pool, checkpoints: dict[str, Path]) -> None:
    ((a, b),) = pool.run(two_paddings, checkpoints["untied"])
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_broken_sweep_leaves_no_hooks(pool: Pool, checkpoints: dict[str, Path]) -> None:
    assert pool.run(fail_in_the_middle, checkpoints["untied"]) == [0]


def test_an_axis_that_cannot_be_scored(pool: Pool, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"axis 'hiden' cannot be scored\. Did you mean 'hidden'\? Known: ffn, heads"):
        pool.run(listen, checkpoints["untied"], ["ffn", "hiden"], 2)


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2"])
def test_a_nan_is_one_error_on_every_rank_that_names_its_layer(
    pool: Pool, checkpoints: dict[str, Path], layout: str
) -> None:
    errors, *others = pool.run(broken, checkpoints["untied"], **LAYOUTS[layout])
    assert all(other == errors for other in others)
    for axis, (on_one, on_all) in zip(BREAKS.values(), errors, strict=True):
        assert on_one.startswith("layer 1 is the first with activations that are not finite (NaN or infinite), on axis")
        assert on_all.endswith(f"on axis {axis}. Check its weights for NaN or infinity, or score in float32.")


def test_a_wrapped_model_is_refused(pool: Pool, checkpoints: dict[str, Path]) -> None:
    pool.run(wrapped, checkpoints["untied"], dp=2)


def test_neurons_of_a_gated_mlp_have_no_one_input(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gated MLP have two projections .* Score them by `post`"):
        pool.run(sweep_all, checkpoints["untied"], 2, tmp_path, [Statistic(neurons="pre")], tp=2)
