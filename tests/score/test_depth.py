"""Leaving out layers equals deleting them from a transformers model, at every layout; no layer runs needlessly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_megatron.convert import load_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import PlanError
from minitron_megatron.events import Event
from minitron_megatron.losses import Output, Vocabulary, lm_loss
from minitron_megatron.model import forward_only, named_shards, output_weight, shape_of
from minitron_megatron.parallel import Topology, sum_over_world
from minitron_megatron.records import DepthScores
from minitron_megatron.score import RunBatches, block_importance, leave_out
from minitron_megatron.testing import Pool
from tests.tiny import LAYOUTS, SHAPE, each_layout, samples, share, transformer

SAMPLES, MICRO_BATCH, GREEDY = 8, 4, 3
LAYERS = range(SHAPE.layers)
LENGTHS = (1, 2, 4)


# ---- reference: transformers' model with layers deleted


Truth = Callable[[Collection[int]], float]
"""Layers to delete -> the metric."""


def logits_of(folder: Path) -> Callable[[frozenset[int]], Tensor]:
    """Layers to delete -> logits of the tokens that count: [tokens, vocab]."""
    model, every = transformer(folder), samples(SAMPLES)
    whole = model.model.layers

    @cache
    @torch.no_grad()
    def logits(removed: frozenset[int]) -> Tensor:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(whole) if i not in removed)
        model.model.config.num_hidden_layers = len(model.model.layers)
        return model(every.tokens, use_cache=False).logits[every.mask].double()

    return logits


def truths(folder: Path) -> dict[str, Truth]:
    logits, labels = logits_of(folder), samples(SAMPLES).labels[samples(SAMPLES).mask]
    whole = logits(frozenset()).log_softmax(-1)

    def loss(removed: Collection[int]) -> float:
        return F.cross_entropy(logits(frozenset(removed)), labels).item()

    def kl(removed: Collection[int]) -> float:
        left = logits(frozenset(removed)).log_softmax(-1)
        return (whole.exp() * (whole - left)).sum(-1).mean().item()

    return {"loss": loss, "kl": kl}


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Path]) -> dict[str, Truth]:
    return truths(checkpoints["untied"])


def true_order(truth: Truth, steps: int) -> list[tuple[int, float]]:
    order: list[tuple[int, float]] = []
    for _ in range(steps):
        removed = [layer for layer, _ in order]
        order.append(min(((i, truth([*removed, i])) for i in LAYERS if i not in removed), key=lambda pair: pair[1]))
    return order


def true_importance(folder: Path) -> Callable[[int, int], float]:
    """(first layer, how many) -> block importance."""
    model, every, states = transformer(folder), samples(SAMPLES), []
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_pre_hook(lambda _, args: states.append(args[0][every.mask].double()))
    with torch.no_grad():
        model(every.tokens)

    def importance(first: int, length: int) -> float:
        before, after = states[first], states[first + length]
        return 1 - ((before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))).mean().item()

    return importance


def blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(first, n) for n in lengths for first in range(SHAPE.layers - n + 1)]


def expect(found: DepthScores, truth: Truth, lengths: Sequence[int], steps: int) -> None:
    assert found.baseline == pytest.approx(truth(()), rel=1e-5, abs=1e-7)
    expected = {(first, n): truth(range(first, first + n)) for first, n in blocks(lengths)}
    assert dict(found.blocks) == pytest.approx(expected, rel=1e-5)
    order = true_order(truth, steps)
    assert [layer for layer, _ in found.greedy] == [layer for layer, _ in order]
    assert [value for _, value in found.greedy] == pytest.approx([value for _, value in order], rel=1e-5)
    counts = (SAMPLES, int(samples(SAMPLES).mask.sum()))
    assert (found.shape, found.samples, found.tokens, found.model_hash) == (SHAPE, *counts, "abc")


# ---- the jobs


def measure(
    topology: Topology, folder: Path, metric: str, lengths: Sequence[int], greedy: int, micro_batch: int = MICRO_BATCH
) -> tuple[DepthScores, int, list[Event]]:
    """Return the scores, the number of layers that this rank ran (once for all of tp), and the events."""
    model, events, ran = load_hf(folder, topology), [], []
    for chunk in model:
        for layer in chunk.decoder.layers:
            layer.register_forward_hook(lambda *_: ran.append(topology.tp_rank == 0))
    batches = share(samples(SAMPLES), topology, micro_batch)
    options: dict[str, Any] = {"topology": topology, "model_hash": "abc", "listener": events.append, "lengths": lengths}
    if metric == "bi":
        return block_importance(model, batches, **options), sum(ran), events
    return leave_out(model, batches, metric=metric, greedy=greedy, **options), sum(ran), events


def by_function(topology: Topology, folder: Path) -> tuple[DepthScores, DepthScores]:
    """Return the negated loss measured by a caller's own function, and the loss by name."""
    model, batches = load_hf(folder, topology), share(samples(SAMPLES), topology)

    def minus_loss(run: RunBatches) -> float:
        pair = torch.zeros(2, dtype=torch.float64)
        for hidden, batch in zip(run(batches), batches, strict=topology.is_last_stage):
            vocab = shape_of(model[-1]).vocab
            vocabulary = Vocabulary(vocab, topology.tp_group, topology.sequence_parallel)
            loss = lm_loss(Output(hidden, output_weight(model[-1])), batch.labels, batch.mask, vocabulary)
            pair += torch.stack([-loss.double(), batch.mask.sum().double()])
        total, tokens = sum_over_world(pair).tolist()
        return total / tokens

    options: dict[str, Any] = {"topology": topology, "lengths": (2,), "greedy": 2}
    return leave_out(model, batches, metric=minus_loss, **options), leave_out(model, batches, **options)


def in_the_padding(topology: Topology, folder: Path) -> list[DepthScores]:
    """Loss, KL and importance of padded samples, with two kinds of tokens in the padding."""
    model, every = load_hf(folder, topology), samples(SAMPLES)
    other = Batch(*(torch.where(every.mask, part, 0) for part in (every.tokens, every.labels)), every.mask)
    found = []
    for each in (every, other):
        batches = share(each, topology)
        found += [leave_out(model, batches, topology=topology, metric=metric) for metric in ("loss", "kl")]
        found.append(block_importance(model, batches, topology=topology))
    return found


def state_of(model: list[Any]) -> list[Any]:
    return [
        (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for chunk in model
        for m in chunk.modules()
    ]


def leave_alone(topology: Topology, folder: Path, breaks: bool) -> bool:
    """Return whether a model is unchanged after a sweep, completed or aborted."""
    model, batches = load_hf(folder, topology), share(samples(SAMPLES), topology)
    model[0].train()
    before, hidden = state_of(model), forward_only(model, batches)

    def listen(event: Event) -> None:
        if breaks:
            raise KeyboardInterrupt

    for sweep in (leave_out, block_importance):
        try:
            sweep(model, batches, topology=topology, listener=listen)
        except KeyboardInterrupt:
            assert breaks
    after = forward_only(model, batches)
    return state_of(model) == before and all(torch.equal(a, b) for a, b in zip(after, hidden, strict=True))


# ---- the tests


@each_layout
def test_the_loss_is_that_of_a_model_with_layers_deleted(
    pool: Pool, checkpoints: dict[str, Path], truth: dict[str, Truth], layout: str
) -> None:
    (found, *_), *others = pool.run(measure, checkpoints["untied"], "loss", LENGTHS, GREEDY, **LAYOUTS[layout])
    expect(found, truth["loss"], LENGTHS, GREEDY)
    assert (found.metric, found.lower_is_better, found.lengths) == ("loss", True, LENGTHS)
    assert all(other == found for other, *_ in others)


@each_layout
def test_the_kl_is_that_to_the_whole_model(
    pool: Pool, checkpoints: dict[str, Path], truth: dict[str, Truth], layout: str
) -> None:
    (found, *_), *_ = pool.run(measure, checkpoints["untied"], "kl", (1, 3), 2, **LAYOUTS[layout])
    expect(found, truth["kl"], (1, 3), 2)
    assert found.baseline == 0


@each_layout
def test_importance_is_one_minus_the_mean_cosine(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    folder, lengths = checkpoints["untied"], (1, 2, 3, 4)
    (found, ran, _), *others = pool.run(measure, folder, "bi", lengths, 0, **LAYOUTS[layout])
    importance = true_importance(folder)
    expected = {(first, n): importance(first, n) for first, n in blocks(lengths)}
    assert dict(found.blocks) == pytest.approx(expected, rel=1e-5)
    assert (found.metric, found.lower_is_better, found.baseline, found.greedy) == ("bi", True, 0.0, ())
    assert (found.samples, found.tokens) == (SAMPLES, int(samples(SAMPLES).mask.sum()))
    assert all(other == found for other, *_ in others)
    assert ran + sum(more for _, more, _ in others) == SAMPLES // MICRO_BATCH * SHAPE.layers


@each_layout
@pytest.mark.parametrize("lengths", [(1,), (2, 3)])
def test_a_block_sweep_runs_just_the_layers_behind_the_blocks(
    pool: Pool, checkpoints: dict[str, Path], layout: str, lengths: tuple[int, ...]
) -> None:
    """Minimum: one whole pass per micro-batch, and for each block the layers behind it."""
    results = pool.run(measure, checkpoints["untied"], "loss", lengths, 0, **LAYOUTS[layout])
    floor = SHAPE.layers + sum(SHAPE.layers - first - length for first, length in blocks(lengths))
    assert sum(ran for _, ran, _ in results) == SAMPLES // MICRO_BATCH * floor


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_a_greedy_sweep_reuses_the_prefix_as_well(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    """Each greedy step is one pass of the remaining network, and for each of its layers the layers behind it."""
    results = pool.run(measure, checkpoints["untied"], "loss", (1,), GREEDY, **LAYOUTS[layout])
    left = [SHAPE.layers - step for step in range(GREEDY)]
    assert sum(ran for _, ran, _ in results) == SAMPLES // MICRO_BATCH * sum(n + n * (n - 1) // 2 for n in left)


@pytest.mark.parametrize("layout", ["tp1", "pp2", "pp2-vp2"])
def test_micro_batches_and_windows_change_nothing(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    """Several windows on one stage, and a tied output layer on two."""
    folder = checkpoints["tied"]
    (found, _, events), *_ = pool.run(measure, folder, "loss", (2,), 2, 1, **LAYOUTS[layout])
    truth = truths(folder)["loss"]
    assert dict(found.blocks) == pytest.approx({b: truth(range(b[0], sum(b))) for b in blocks((1, 2))}, rel=1e-5)
    networks = 1 + len(blocks((1, 2))) + SHAPE.layers - 1
    assert {(event.label, event.total, event.unit) for event in events} == {("depth", SAMPLES * networks, "passes")}
    assert events[-1].done == events[-1].total
    assert [event.done for event in events] == sorted({event.done for event in events})


def test_all_ranks_passes_are_told(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for _, _, events in pool.run(measure, checkpoints["untied"], "bi", (1,), 0, dp=2):
        assert [(event.done, event.total) for event in events] == [(2, 2)]
    for _, _, events in pool.run(measure, checkpoints["untied"], "loss", (4,), 0, dp=2):
        assert [(event.done, event.total) for event in events] == [(6, 6)]


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "pp2"])
def test_a_callers_function_measures_and_higher_is_better(
    pool: Pool, checkpoints: dict[str, Path], layout: str
) -> None:
    for own_metric, by_name in pool.run(by_function, checkpoints["untied"], **LAYOUTS[layout]):
        assert (own_metric.metric, own_metric.lower_is_better, own_metric.baseline) == (
            "minus_loss",
            False,
            pytest.approx(-by_name.baseline),
        )
        assert dict(own_metric.blocks) == pytest.approx(
            {block: -value for block, value in by_name.blocks.items()}, rel=1e-5
        )
        assert own_metric.greedy == tuple((layer, pytest.approx(-value, rel=1e-5)) for layer, value in by_name.greedy)


def test_what_stands_in_the_padding_counts_for_nothing(pool: Pool, checkpoints: dict[str, Path]) -> None:
    (found,) = pool.run(in_the_padding, checkpoints["untied"])
    assert found[:3] == found[3:]


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("layout", ["tp1", "pp2-vp2"])
def test_the_model_is_left_as_it_was(pool: Pool, checkpoints: dict[str, Path], layout: str, breaks: bool) -> None:
    assert all(pool.run(leave_alone, checkpoints["untied"], breaks, **LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("metric", "lengths", "greedy", "message"),
    [
        ("los", (1,), 0, r"metric 'los' is not known\. Did you mean 'loss'\? Use loss or kl, or a function"),
        ("loss", (5,), 0, r"5 of 5 layers cannot be left out at once\. Use 1 to 4"),
        ("kl", (0,), 0, "0 of 5 layers"),
        ("loss", (1,), 5, "5 of 5 layers"),
        ("bi", (1, 6), 0, "6 of 5 layers"),
        ("loss", (), 0, r"no block length is given\. Give lengths from 1 to 4"),
    ],
)
def test_what_cannot_be_left_out(
    pool: Pool, checkpoints: dict[str, Path], metric: str, lengths: tuple[int, ...], greedy: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        pool.run(measure, checkpoints["untied"], metric, lengths, greedy)


def of_nan(topology: Topology, folder: Path) -> list[str]:
    """Return the errors for a model whose last layer writes a NaN on one rank."""
    model, errors = load_hf(folder, topology), []
    for shard in named_shards(model):
        if shard.name == "decoder.layers.4.mlp.linear_fc2.weight" and topology.tp_rank == topology.tp - 1:
            shard.tensor.data.view(-1)[-1] = torch.nan
    for sweep in (leave_out, block_importance):
        with pytest.raises(PlanError) as caught:
            sweep(model, share(samples(SAMPLES), topology), topology=topology)
        errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2"])
def test_a_nan_is_one_error_on_every_rank(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    for loss, importance in pool.run(of_nan, checkpoints["untied"], **LAYOUTS[layout]):
        assert loss == "the whole network measures nan. Check its weights for NaN or infinity, or score in float32."
        assert importance.startswith(
            "leaving out layers 4 to 4 measures nan, which cannot be ranked. Check the weights there"
        )
