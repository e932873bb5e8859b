"""The cut model equals indexing the Hugging Face tensors, bit for bit, at every layout (laws 1 to 3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.convert import folder_hash, load_hf, model_hash, save_hf
from minitron_megatron.errors import MinitronError, PlanError, TopologyError
from minitron_megatron.layout import Shape
from minitron_megatron.model import named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.records import Plan
from minitron_megatron.score import score
from minitron_megatron.testing import LivePeak, Pool
from minitron_megatron.train import LMObjective, Training, mean_loss, train
from tests.tiny import (
    EVERY,
    LAYOUTS,
    SHAPE,
    SHAPES,
    cross_entropy,
    naive_training,
    samples,
    share,
    transformer,
    write_llama,
)

SIZES = {"layers": (0, 1, 3, 4), "hidden": 32, "ffn": 40, "heads": 4}
WHOLE = {"hidden": {None: tuple(range(48))}, "ffn": dict.fromkeys(range(5), tuple(range(64)))}
FIRST, LAST = tuple(range(32)), tuple(range(32, 64))


def lopsided(shape: Shape) -> Plan:
    """Neurons that lie on one tp rank only, on the other one only, and unevenly; other query heads in each group."""
    ffn = {0: FIRST, 1: LAST, 2: (*range(0, 10), *range(40, 62)), 3: (*range(1, 31), 33, 60), 4: tuple(range(0, 64, 2))}
    heads = {0: (0, 1, 6, 7), 1: (2, 3, 4, 5), 2: (0, 3, 4, 7), 3: (1, 2, 5, 6), 4: (0, 1, 4, 5)}
    return Plan(shape, {"ffn": ffn, "heads": heads, "hidden": {None: (*range(0, 20), *range(30, 46))}})


def plans(shape: Shape) -> dict[str, Plan]:
    return {
        "whole": Plan(shape, {**WHOLE, "heads": dict.fromkeys(range(5), tuple(range(8)))}, tuple(range(5))),
        "lopsided": lopsided(shape),
        # layer 2 changes its pipeline stage; with vp=2, layers 1, 2 and 3 do
        "early": Plan(shape, {"ffn": dict.fromkeys(range(4), LAST)}, (0, 1, 2, 3)),
        # layer 3 goes up a stage
        "few": Plan(shape, {"hidden": {None: tuple(range(1, 48, 2))}}, (0, 3, 4)),
    }


# ---- reference: indexing the Hugging Face tensors


def indexed(folder: Path, plan: Plan) -> dict[str, Tensor]:
    full, shape = load_file(folder / "model.safetensors"), plan.shape
    hidden = list(plan.keep.get("hidden", {None: range(shape.hidden)})[None])
    out = {"model.embed_tokens.weight": full["model.embed_tokens.weight"][:, hidden]}
    out["model.norm.weight"] = full["model.norm.weight"][hidden]
    if "lm_head.weight" in full:
        out["lm_head.weight"] = full["lm_head.weight"][:, hidden]
    for new, layer in enumerate(plan.kept_layers):
        ffn = list(plan.keep["ffn"][layer] if "ffn" in plan.keep else range(shape.ffn))
        heads = plan.keep["heads"][layer] if "heads" in plan.keep else range(shape.heads)
        q = [head * shape.head_dim + i for head in heads for i in range(shape.head_dim)]
        for name, weight in full.items():
            if name.startswith(f"model.layers.{layer}."):
                leaf = name.split(".", 3)[3]
                rows = {"mlp.gate_proj": ffn, "mlp.up_proj": ffn, "self_attn.q_proj": q}
                columns = {"mlp.down_proj": ffn, "self_attn.o_proj": q}
                part = leaf.removesuffix(".weight")
                into_residual = part in columns or "norm" in part
                kept = weight[hidden] if into_residual else weight[:, hidden]
                kept = kept[rows[part]] if part in rows else kept
                out[f"model.layers.{new}.{leaf}"] = kept[:, columns[part]] if part in columns else kept
    return out


def expect_export(folder: Path, source: Path, plan: Plan) -> None:
    found, expected = load_file(folder / "model.safetensors"), indexed(source, plan)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape, name
        assert torch.equal(found[name], weight), name


# ---- the jobs


def best_plan(topology: Topology, folder: Path) -> Plan:
    model = load_hf(folder, topology)
    return choose(score(model, share(samples(12), topology), topology=topology), **SIZES)


def cut(topology: Topology, folder: Path, plan: Plan, out: Path) -> float:
    """Cut and export; return the loss of the cut model in memory."""
    model = load_hf(folder, topology)
    old = [shard.tensor for shard in named_shards(model)]
    before = model_hash(model, topology)
    small = trim(model, plan, topology)
    assert [tensor.numel() for tensor in old] == [0] * len(old)
    save_hf(small, out, topology, files_from=folder)
    after = model_hash(small, topology)
    assert (after == before) == (plan.target == plan.shape)
    return mean_loss(small, share(samples(8, seed=1), topology), LMObjective(topology), topology)[0]


def cut_all(topology: Topology, folder: Path, shape: Shape, out: Path) -> tuple[Plan, dict[str, float], dict[str, str]]:
    """Run the best cut and the made-up ones; return (best plan, losses, errors)."""
    best, losses, errors = best_plan(topology, folder), {}, {}
    for name, plan in {"best": best, **plans(shape)}.items():
        try:
            losses[name] = cut(topology, folder, plan, out / name)
        except MinitronError as error:
            errors[name] = str(error)
    return best, losses, errors


# ---- law 1


@pytest.fixture(scope="module")
def best(pool: Pool, checkpoints: dict[str, Path]) -> dict[str, Plan]:
    """Return the plans that one process makes; their cuts have clear margins."""
    found = {name: pool.run(best_plan, checkpoints[name])[0] for name in ("untied", "tied")}
    for plan in found.values():
        assert min(margin for layers in plan.margins.values() for margin in layers.values()) > 1e-5
    return found


MODELS = [
    *(("untied", layout) for layout in EVERY if layout != "tp2-pp2"),
    *(("tied", layout) for layout in ("pp2-vp2", "tp2-pp2")),
]


@pytest.mark.parametrize(("name", "layout"), MODELS)
def test_the_layout_changes_neither_the_plan_nor_a_bit_of_the_export(
    pool: Pool, checkpoints: dict[str, Path], best: dict[str, Plan], name: str, layout: str, tmp_path: Path
) -> None:
    folder = checkpoints[name]
    results = pool.run(cut_all, folder, SHAPES[name], tmp_path, **LAYOUTS[layout])
    for found, losses, errors in results:
        assert replace(found, margins={}) == replace(best[name], margins={})
        if layout == "pp2-vp2":
            assert errors == {
                "few": "3 layers cannot fill 4 pipeline stages (pp=2 x vp=2). Use at most 3 stages.",
            }
        else:
            assert errors == {}
        assert losses == results[0][1]
    for cut_name, plan in {"best": best[name], **plans(SHAPES[name])}.items():
        if cut_name in results[0][1]:
            expect_export(tmp_path / cut_name, folder, plan)
            expect_loss(tmp_path / cut_name, results[0][1][cut_name])


def expect_loss(folder: Path, found: float) -> None:
    """transformers reads the export and computes the same loss as the model in memory."""
    with torch.no_grad():
        assert found == pytest.approx(cross_entropy(transformer(folder), samples(8, seed=1)).item(), rel=1e-5)


def test_a_plan_of_the_tied_model_cuts_its_embedding_once(checkpoints: dict[str, Path]) -> None:
    assert "lm_head.weight" not in indexed(checkpoints["tied"], lopsided(SHAPES["tied"]))


# ---- law 3


def masked(folder: Path, plan: Plan) -> Any:
    """Return a transformers model in which the cut units contribute nothing."""
    model = transformer(folder)
    for i, layer in enumerate(model.model.layers):
        cut = sorted(set(range(SHAPE.ffn)) - set(plan.keep["ffn"][i]))
        layer.mlp.down_proj.weight.data[:, cut] = 0
        for head in set(range(SHAPE.heads)) - set(plan.keep["heads"][i]):
            layer.self_attn.o_proj.weight.data[:, head * SHAPE.head_dim : (head + 1) * SHAPE.head_dim] = 0
    return model


def test_pruned_is_masked(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keep = {axis: layers for axis, layers in lopsided(SHAPE).keep.items() if axis != "hidden"}
    plan = Plan(SHAPE, keep)
    pool.run(cut, checkpoints["untied"], plan, tmp_path / "cut", tp=2)
    tokens = samples(4).tokens
    with torch.no_grad():
        pruned, truth, whole = (
            model(tokens).logits
            for model in (
                transformer(tmp_path / "cut"),
                masked(checkpoints["untied"], plan),
                transformer(checkpoints["untied"]),
            )
        )
    assert (pruned - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (whole - truth).abs().max() > 1e-2 * truth.abs().max()


def hidden_states(topology: Topology, folder: Path, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    from minitron_megatron.model import forward_only

    model, batches = load_hf(folder, topology), share(samples(8), topology)
    before = forward_only(model, batches)
    return before, forward_only(trim(model, plan, topology), batches)


@pytest.mark.parametrize("layout", ["tp2", "pp2-vp2"])
def test_keeping_everything_changes_nothing(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    for plan in (Plan(SHAPE), plans(SHAPE)["whole"]):
        before, after = pool.run(hidden_states, checkpoints["untied"], plan, **LAYOUTS[layout])[-1]
        assert len(before) == 4
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- a trimmed model is a model like any other


def train_cut(topology: Topology, folder: Path, plan: Plan, out: Path, training: Training) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = []
    model = trim(load_hf(folder, topology), plan, topology)
    save_hf(model, out, topology, files_from=folder)
    train(
        model,
        LMObjective(topology),
        lambda step: share(samples(8, seed=step), topology),
        training,
        topology,
        listener=lambda event: curve.append(dict(event.values)),
    )
    return curve


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-pp2", "pp2-vp2"])
def test_a_trimmed_model_trains_like_its_export(
    pool: Pool, checkpoints: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """mcore's marks (who is split, who is shared, whose gradient is summed) outlive the cut: tied, lopsided, moved."""
    shape, training = SHAPES["tied"], Training(steps=3, lr=1e-3, warmup_steps=1)
    keep = {axis: {k: v for k, v in layers.items() if k != 4} for axis, layers in lopsided(shape).keep.items()}
    plan, out = Plan(shape, keep, (0, 1, 2, 3)), tmp_path / "cut"
    curve = pool.run(train_cut, checkpoints["tied"], plan, out, training, **LAYOUTS[layout])[0]
    truth = naive_training(transformer(out), lambda step: samples(8, seed=step), training, cross_entropy)
    for found, expected in zip(curve, truth, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


# ---- refusals: every rank raises the same error, and the model is as it was


def refused(topology: Topology, folder: Path, plans: list[Plan], wrap: bool) -> tuple[str, str]:
    """Return (error, hash of the model afterwards). plans: one per rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = load_hf(folder, topology)
    given = model
    if wrap:
        given = [DistributedDataParallel(model[0].config, DistributedDataParallelConfig(), chunk) for chunk in model]
    try:
        trim(given, plans[topology.rank], topology)
    except (PlanError, TopologyError) as error:
        return f"{type(error).__name__}: {error}", model_hash(model, topology)
    raise AssertionError("nothing was refused")


OTHER = Plan(replace(SHAPE, hidden=40))
FITS = Plan(SHAPE)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("plans", [[OTHER, OTHER], [FITS, OTHER], [OTHER, FITS]])
def test_a_plan_for_another_model_is_refused_on_every_rank(
    pool: Pool, checkpoints: dict[str, Path], layout: str, plans: list[Plan]
) -> None:
    results = pool.run(refused, checkpoints["untied"], plans, False, **LAYOUTS[layout])
    assert len({error for error, _ in results}) == 1
    error, after = results[0]
    assert error.startswith("PlanError: the plan cuts another model: this one has hidden 48 instead of 40. ")
    assert "Score this model and choose again" in error
    assert after == folder_hash(checkpoints["untied"])


def test_a_wrapped_model_is_refused(pool: Pool, checkpoints: dict[str, Path]) -> None:
    results = pool.run(refused, checkpoints["untied"], [FITS, FITS], True, dp=2)
    message = "PlanError: trim needs a bare GPTModel, but this is a DistributedDataParallel. Unwrap it: model.module."
    assert results == [(message, folder_hash(checkpoints["untied"]))] * 2


def test_sizes_that_do_not_fit_the_layout_say_which_would(pool: Pool, checkpoints: dict[str, Path]) -> None:
    plan = Plan(SHAPE, {"ffn": dict.fromkeys(range(5), tuple(range(15)))})
    results = pool.run(refused, checkpoints["untied"], [plan, plan], False, tp=2)
    assert results[0] == results[1]
    error, after = results[0]
    assert error.startswith("TopologyError: axis ffn has 15 units, which cannot be split over TP=2. Run with TP 1")
    assert after == folder_hash(checkpoints["untied"])


# ---- law 2


WIDE = Shape(layers=4, hidden=512, ffn=256, heads=8, kv_groups=2, head_dim=16, vocab=131)


def peak(topology: Topology, folder: Path, plan: Plan, out: Path) -> float:
    """Return the peak memory of a cut relative to what law 2 allows: the old shards and the largest of them."""
    model = load_hf(folder, topology)
    weights = [shard.tensor.numel() * shard.tensor.element_size() for shard in named_shards(model)]
    with LivePeak() as meter:
        small = trim(model, plan, topology)
    save_hf(small, out, topology)
    return (sum(weights) + meter.extra) / (sum(weights) + max(weights))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("wide") / "model", WIDE, seed=5)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_the_peak_is_the_old_shards_and_one_parameter(pool: Pool, wide: Path, layout: str, tmp_path: Path) -> None:
    """The hardest cut: nearly all units of both axes are kept, and every neuron changes its rank."""
    ffn = {layer: (*range(layer, layer + 200), *range(220, 250)) for layer in range(4)}
    plan = Plan(WIDE, {"ffn": ffn, "hidden": {None: (*range(100), *range(110, 512))}})
    peaks = pool.run(peak, wide, plan, tmp_path / "cut", **LAYOUTS[layout])
    assert max(peaks) < 1.05
    expect_export(tmp_path / "cut", wide, plan)
