"""A model is the same at every layout: layer placement, names, initial weights, rotary frequencies."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import TopologyError
from minitron_megatron.layout import Shape, lookup
from minitron_megatron.model import (
    ModelConfig,
    assign,
    build,
    check_fits,
    config_of,
    fill_initial,
    named_shards,
    owner_rank,
)
from minitron_megatron.model.config import pipeline_layout, rotary_frequencies
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

SHAPE = Shape(layers=5, hidden=24, ffn=20, heads=4, kv_groups=2, head_dim=8, vocab=130)
TIED = SHAPE.resized(tied=True)

LAYOUTS = [
    pytest.param({"tp": 2}, id="tp2"),
    pytest.param({"tp": 2, "sequence_parallel": True}, id="tp2-sp"),
    pytest.param({"pp": 2}, id="pp2"),
    pytest.param({"pp": 2, "vp": 2}, id="pp2-vp2"),
    pytest.param({"dp": 2}, id="dp2"),
]


# ---- placement of the layers


@pytest.mark.parametrize(
    ("layers", "pp", "vp", "stages"),
    [
        (5, 2, 1, [[0, 1, 2], [3, 4]]),
        (4, 2, 1, [[0, 1], [2, 3]]),
        (5, 2, 2, [[0, 1], [2], [3], [4]]),
        (3, 1, 1, [[0, 1, 2]]),
        (2, 2, 1, [[0], [1]]),
        (11, 4, 1, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]),
    ],
)
def test_layers_are_dealt_in_order_the_larger_stages_first(
    layers: int, pp: int, vp: int, stages: list[list[int]]
) -> None:
    topology = Topology(pp=pp, vp=vp)
    assert topology.stages(layers) == stages
    places = {layer: chunk % pp for chunk, held in enumerate(stages) for layer in held}
    assert {layer: topology.stage_of(layer, layers) for layer in range(layers)} == places


def test_megatron_is_told_of_uneven_stages() -> None:
    assert pipeline_layout(5, Topology(pp=2)) == [["embedding", *["decoder"] * 3], [*["decoder"] * 2, "loss"]]
    assert pipeline_layout(5, Topology(tp=2)) is None


@pytest.mark.parametrize(("layers", "pp", "vp"), [(1, 2, 1), (3, 2, 2)])
def test_too_few_layers_for_the_stages_are_refused(layers: int, pp: int, vp: int) -> None:
    with pytest.raises(TopologyError, match=rf"{layers} layers? cannot fill {pp * vp} pipeline stages .* at most"):
        check_fits(SHAPE.resized(layers=layers), Topology(pp=pp, vp=vp))


@pytest.mark.parametrize(
    ("sizes", "tp", "words"),
    [
        ({}, 4, "axis kv_groups has 2 units, which cannot be split over TP=4. Run with TP 1 or 2, or"),
        ({"ffn": 21}, 2, "axis ffn has 21 units, which cannot be split over TP=2. Run with TP 1, or"),
        ({"kv_groups": 3, "heads": 6, "ffn": 24}, 3, "axis vocab has 256 units, which cannot be split over TP=3. Run"),
    ],
)
def test_a_shape_that_tp_cannot_split_is_refused_with_what_would_do(sizes: dict[str, int], tp: int, words: str) -> None:
    with pytest.raises(TopologyError) as caught:
        check_fits(SHAPE.resized(**sizes), Topology(tp=tp))
    assert words in str(caught.value)


def test_experts_need_sequence_parallelism() -> None:
    said = r"^experts at tp of 2 or more need sequence parallelism\. Set `sequence_parallel` to true\.$"
    with pytest.raises(TopologyError, match=said):
        check_fits(replace(SHAPE, ffn=0, experts=4, expert_ffn=8), Topology(tp=2))


def test_a_shape_that_fits_is_let_pass() -> None:
    check_fits(SHAPE, Topology(tp=2, pp=2, vp=2))


# ---- names


def names_and_places(topology: Topology, shape: Shape) -> list[tuple[str, bool, int]]:
    """Return (name, whether it is a tied copy, owner rank) of this rank's shards, which `build` leaves on `meta`."""
    shards = list(named_shards(build(ModelConfig(shape), topology)))
    assert all(shard.tensor.is_meta for shard in shards)
    return [(shard.name, shard.tied_copy, owner_rank(shard.name, shape, topology)) for shard in shards]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_every_parameter_has_one_name_and_one_owner(pool: Pool, shape: Shape, layout: dict[str, int]) -> None:
    ranks = pool.run(names_and_places, shape, **layout)
    pp = layout.get("pp", 1)
    owned = []
    for rank, shards in enumerate(ranks):
        originals = [(name, owner) for name, tied_copy, owner in shards if not tied_copy]
        assert all(owner == rank for _, owner in originals)
        owned.append([name for name, _ in originals])
    held = list(chain(*owned)) if pp == 2 else owned[0]
    assert sorted(held) == sorted(shape.names())


def test_a_tied_embedding_on_two_stages_has_a_copy_with_the_same_name(pool: Pool) -> None:
    first, last = pool.run(names_and_places, TIED, pp=2)
    assert [shard for shard in first if shard[1]] == []
    assert [shard for shard in last if shard[1]] == [("embedding.word_embeddings.weight", True, 0)]
    assert ("embedding.word_embeddings.weight", False, 0) in first


# ---- initial weights


def drawn(topology: Topology, shape: Shape, seed: int, **more: Any) -> list[tuple[str, Tensor]]:
    chunks = build(ModelConfig(shape, init_std=0.5, **more), topology)
    fill_initial(chunks, topology, seed)
    return [(shard.name, shard.tensor.detach()) for shard in named_shards(chunks)]


def whole(ranks: list[list[tuple[str, Tensor]]], shape: Shape, tp: int) -> dict[str, Tensor]:
    """Return the unsharded tensors assembled from all ranks; check that ranks with the same shard agree."""
    sizes, full = shape.sizes(), {}
    for rank, shards in enumerate(ranks):
        for name, tensor in shards:
            param = lookup(name)
            into = full.setdefault(name, torch.full(param.shape(sizes), torch.nan))
            rows = [param.shard_rows(dim, sizes, rank % tp, tp) for dim in range(tensor.dim())]
            at = torch.meshgrid(*rows, indexing="ij")
            assert (into[at].isnan() | (into[at] == tensor)).all(), f"two ranks hold different {name}"
            into[at] = tensor
    return full


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_first_weights_do_not_depend_on_the_layout(pool: Pool, shape: Shape) -> None:
    alone = whole(pool.run(drawn, shape, 7), shape, 1)
    assert sorted(alone) == sorted(shape.names())
    for layout in ({"tp": 2}, {"pp": 2}, {"pp": 2, "vp": 2}):
        spread = whole(pool.run(drawn, shape, 7, **layout), shape, layout.get("tp", 1))
        assert spread.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(spread[name], tensor), (layout, name)


def test_first_weights_have_the_spread_of_gpt2_and_differ_by_name_and_seed(pool: Pool) -> None:
    full = whole(pool.run(drawn, SHAPE, 7), SHAPE, 1)
    other = whole(pool.run(drawn, SHAPE, 8), SHAPE, 1)
    layers = [f"decoder.layers.{layer}." for layer in range(SHAPE.layers)]
    for leaf, std in {
        "self_attention.linear_qkv.weight": 0.5,
        "mlp.linear_fc1.weight": 0.5,
        "self_attention.linear_proj.weight": 0.5 / 10**0.5,
        "mlp.linear_fc2.weight": 0.5 / 10**0.5,
    }.items():
        drawn_here = [full[layer + leaf] for layer in layers]
        assert torch.stack(drawn_here).std().item() == pytest.approx(std, rel=0.1)
        assert not torch.equal(drawn_here[0], drawn_here[1])
        assert not torch.equal(drawn_here[0], other[layers[0] + leaf])
    for name, tensor in full.items():
        if "norm" in name:
            assert (tensor == 1).all()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert full[name][:130].std().item() == pytest.approx(0.5, rel=0.1)
        assert not full[name][130:].any() and full[name].shape == (256, 24)


def drawn_for_nemotron(topology: Topology) -> list[tuple[str, Tensor]]:
    shape = SHAPE.resized(gated=False, norm_bias=True, qkv_bias=True)
    return drawn(topology, shape, 7, norm="LayerNorm", zero_centered_norm=True, activation="relu2")


def test_norms_that_store_gamma_less_one_and_biases_begin_at_zero(pool: Pool) -> None:
    [shards] = pool.run(drawn_for_nemotron)
    zero = {name.rpartition(".")[2] for name, tensor in shards if "norm" in name and not tensor.any()}
    assert zero == {"weight", "bias"}
    for name, tensor in shards:
        assert tensor.any() == ("norm" not in name and not name.endswith("bias")), name


# ---- assigning a tensor


def assigned(topology: Topology, shape: Shape) -> list[tuple[str, dict[str, Any], dict[str, Any], bool]]:
    """Return (name, mcore's attributes before, after, whether it is the new tensor and trainable) of each shard."""
    results = []
    for shard in named_shards(build(ModelConfig(shape), topology)):
        before = dict(shard.tensor.__dict__)
        given = torch.rand(shard.tensor.shape)
        assign(shard, given)
        now: Any = shard.tensor
        results.append((shard.name, before, dict(now.__dict__), torch.equal(now, given) and now.requires_grad))
    return results


def test_assign_keeps_megatrons_attributes(pool: Pool) -> None:
    ranks = pool.run(assigned, TIED, tp=2, sequence_parallel=True) + pool.run(assigned, TIED, pp=2)
    marks: dict[str, set[str]] = {}
    for results in ranks:
        for name, before, after, is_assigned in results:
            assert before == after and is_assigned, name
            marks.setdefault(name.rpartition("layers.")[2], set()).update(key for key, on in after.items() if on)
    assert "tensor_model_parallel" in marks["0.mlp.linear_fc1.weight"]
    assert "sequence_parallel" in marks["0.input_layernorm.weight"]
    assert "shared_embedding" in marks["embedding.word_embeddings.weight"]


def misfit(topology: Topology) -> str:
    shard = next(iter(named_shards(build(ModelConfig(SHAPE), topology))))
    before = shard.tensor
    with pytest.raises(ValueError) as caught:
        assign(shard, torch.zeros(256, 23))
    assert shard.tensor is before
    return str(caught.value)


def test_assign_refuses_another_shape(pool: Pool) -> None:
    [message] = pool.run(misfit)
    assert message == "embedding.word_embeddings.weight has shape (256, 24), but the new tensor has (256, 23)"


# ---- rotary frequencies


SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3, other constants": {
        "rope_type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 7.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_frequencies_equal_those_of_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[kind]
    theirs = LlamaConfig(
        hidden_size=96,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})},
    )
    shape = Shape(layers=1, hidden=96, ffn=8, heads=1, kv_groups=1, head_dim=128, vocab=8)
    ours = ModelConfig(shape, rotary_base=500000.0, rotary_scaling=scaling, max_positions=131072)
    want = LlamaRotaryEmbedding(theirs).inv_freq
    assert (want[1:] < want[:-1]).all()
    torch.testing.assert_close(rotary_frequencies(ours), want, rtol=1e-6, atol=0)


def test_a_head_that_is_rotated_in_part_has_the_frequencies_of_that_part() -> None:
    half = ModelConfig(SHAPE.resized(head_dim=16), rotary_share=0.5)
    whole = ModelConfig(SHAPE.resized(head_dim=8))
    assert torch.equal(rotary_frequencies(half), rotary_frequencies(whole))


def frequencies_in_use(topology: Topology, config: ModelConfig) -> list[Tensor]:
    return [chunk.rotary_pos_emb.inv_freq for chunk in build(config, topology)]


def test_a_built_model_uses_its_scaled_frequencies(pool: Pool) -> None:
    config = ModelConfig(SHAPE, rotary_scaling=SCALINGS["linear"])
    for chunks in pool.run(frequencies_in_use, config, pp=2):
        for frequencies in chunks:
            assert torch.equal(frequencies, rotary_frequencies(config))


# ---- a user's own model


def described(topology: Topology, config: ModelConfig) -> ModelConfig:
    [model] = build(config, topology)
    assert config_of(model) is config
    del model.minitron
    return config_of(model)


def test_a_foreign_model_describes_itself(pool: Pool) -> None:
    config = ModelConfig(TIED, norm_eps=1e-6, max_positions=64)
    [found] = pool.run(described, config)
    assert found.shape == TIED.resized(vocab=256)  # the model does not know where its padding begins
    assert (found.norm, found.norm_eps, found.max_positions) == ("RMSNorm", 1e-6, 64)
