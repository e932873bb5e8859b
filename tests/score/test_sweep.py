"""Scores are those of plain transformers hooks and a few lines of torch, at every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
from minitron_megatron.parallel import Topology
from minitron_megatron.records import Scores, Statistic
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from tests.tiny import LAYOUTS, SHAPE, each_layout, samples, share, transformer

STATISTICS = [Statistic(batch, sequence) for batch, sequence in product(("l2", "mean", "var"), repeat=2)]
SAMPLES = 12

Values = dict[str, dict[int | None, Tensor]]


# ---- the truth: hooks on transformers' modules, one sample at a time


def activations(folder: Path, every: Batch) -> dict[tuple[str, int], list[Tensor]]:
    """(module, layer) -> of each sample, what passes at the positions that count: [positions, units]."""
    model, seen = transformer(folder), {}

    def keep(name: str, layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor, ...], out: Tensor | None = None) -> None:
            seen.setdefault((name, layer), []).append((arguments[0] if out is None else out)[0].double())

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep("ffn", i))
        layer.self_attn.o_proj.register_forward_pre_hook(keep("heads", i))
        layer.input_layernorm.register_forward_hook(keep("norm1", i))
        layer.post_attention_layernorm.register_forward_hook(keep("norm2", i))
    for tokens, mask in zip(every.tokens, every.mask, strict=True):
        with torch.no_grad():
            model(tokens[mask].unsqueeze(0))
    return seen


REDUCE = {
    "mean": lambda a: a.abs().mean(0),
    "l2": lambda a: a.norm(dim=0),
    "var": lambda a: a.var(0, unbiased=False),
}


def truth(seen: dict[tuple[str, int], list[Tensor]], statistic: Statistic) -> Values:
    def channels(name: str, layer: int) -> Tensor:
        return REDUCE[statistic.batch](torch.stack([REDUCE[statistic.sequence](a) for a in seen[name, layer]]))

    layers = range(SHAPE.layers)
    return {
        "ffn": {i: channels("ffn", i) for i in layers},
        "heads": {i: channels("heads", i).view(SHAPE.heads, SHAPE.head_dim).norm(dim=1) for i in layers},
        "hidden": {None: sum(channels(norm, i) for norm in ("norm1", "norm2") for i in layers)},
    }


@pytest.fixture(scope="module")
def seen(checkpoints: dict[str, Path]) -> dict[tuple[str, int], list[Tensor]]:
    return activations(checkpoints["untied"], samples(SAMPLES))


# ---- the jobs


def sweep_all(topology: Topology, folder: Path, micro_batch: int, out: Path) -> tuple[list[Scores], list[str]]:
    """Scores by all nine statistics, and of each run the hash of its file; the first statistic runs twice."""
    model, mine = load_hf(folder, topology), share(samples(SAMPLES), topology, micro_batch)
    before = hooks(model)
    found, files = [], []
    for statistic in [*STATISTICS, STATISTICS[0]]:
        found.append(score(model, mine, topology=topology, statistic=statistic, model_hash="abc"))
        path = out / f"{topology.rank}"
        found[-1].save(path)
        files.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert hooks(model) == before == 0
    return found, files


def hooks(model: list[Any]) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for chunk in model for m in chunk.modules())


def fail_in_the_middle(topology: Topology, folder: Path) -> int:
    """Hooks that stay when a sweep is broken off."""
    model = load_hf(folder, topology)

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, share(samples(SAMPLES), topology), topology=topology, listener=stop)
    return hooks(model)


def listen(topology: Topology, folder: Path, axes: list[str], micro_batch: int) -> tuple[Scores, list[Event]]:
    model, events = load_hf(folder, topology), []
    mine = share(samples(SAMPLES), topology, micro_batch)
    return score(model, mine, axes, topology=topology, listener=events.append), events


def two_paddings(topology: Topology, folder: Path) -> tuple[Tensor, Tensor]:
    """Scores of the same samples with different tokens in the padding."""
    model, every = load_hf(folder, topology), samples(SAMPLES)
    other = Batch(torch.where(every.mask, every.tokens, 0), every.labels, every.mask)
    scores = (score(model, share(each, topology), ["ffn"], topology=topology) for each in (every, other))
    a, b = (torch.stack(list(each.values["ffn"].values())) for each in scores)
    return a, b


# ---- the tests


@each_layout
def test_scores_are_the_naive_truth(
    pool: Pool, checkpoints: dict[str, Path], seen: dict, layout: str, tmp_path: Path
) -> None:
    """All nine statistics, every axis, samples padded at the end; and the same file from every rank and every run."""
    results = pool.run(sweep_all, checkpoints["untied"], 3, tmp_path, **LAYOUTS[layout])
    found, files = results[0]
    for statistic, scores in zip(STATISTICS, found, strict=False):
        expect_truth(scores, truth(seen, statistic))
        assert (scores.statistic, scores.shape, scores.model_hash) == (statistic, SHAPE, "abc")
        assert (scores.samples, scores.tokens) == (SAMPLES, int(samples(SAMPLES).mask.sum()))
    assert files[0] == files[-1]
    assert len(set(files)) == len(STATISTICS)
    assert all(other == files for _, other in results)


def expect_truth(scores: Scores, truth: Values) -> None:
    assert {axis: list(layers) for axis, layers in scores.values.items()} == {a: list(ls) for a, ls in truth.items()}
    for axis, layers in truth.items():
        for layer, units in layers.items():
            error = (scores.values[axis][layer] - units).abs().max() / units.max()
            assert error < 1e-5, f"{scores.statistic} of {axis} in layer {layer}: off by {error:.1e} of the largest"


@pytest.mark.parametrize("layout", ["tp1", "pp2", "pp2-vp2"])
def test_micro_batches_and_windows_change_nothing(
    pool: Pool, checkpoints: dict[str, Path], seen: dict, layout: str
) -> None:
    """Twelve micro-batches are more than one window."""
    (scores, events), *_ = pool.run(listen, checkpoints["untied"], ["heads", "hidden"], 1, **LAYOUTS[layout])
    expected = truth(seen, Statistic())
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
