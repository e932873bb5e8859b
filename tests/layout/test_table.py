"""Layout table against loops written out by hand, and against the parameters of models built by megatron-core."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from minitron_megatron.errors import LayoutError
from minitron_megatron.layout import (
    PUBLIC_AXES,
    TABLE,
    Shape,
    axis_coords,
    expert_of,
    kept_rows,
    layer_of,
    lookup,
    markdown,
    parameters,
)
from minitron_megatron.model import ModelConfig, build, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

SHAPE = Shape(layers=3, hidden=24, ffn=20, heads=8, kv_groups=4, head_dim=6, vocab=130)
SIZES = SHAPE.sizes()
LAYER = "decoder.layers.0."


# ---- axes and kept rows, by hand


def test_heads_number_the_query_heads_of_all_groups() -> None:
    want = []
    for group in range(4):
        for head in ("q0", "q1", "k", "v"):
            want += [group * 2 + int(head[1]) if head[0] == "q" else -1] * 6
    got = axis_coords("heads", "kv_group (q + k + v) head_dim", SIZES)
    assert got is not None and got.tolist() == want


def test_an_axis_that_a_dim_does_not_name_is_none() -> None:
    assert axis_coords("ffn", "hidden", SIZES) is None
    assert axis_coords("heads", "kv_group head_dim", SIZES) is None


def kept_by_hand(heads: set[int], groups: set[int], per_group: tuple[str, ...]) -> list[int]:
    rows, row = [], 0
    for group in range(4):
        for head in per_group:
            stays = group in groups and (head[0] != "q" or group * 2 + int(head[1]) in heads)
            rows += range(row, row + 6) if stays else []
            row += 6
    return rows


def test_kept_heads_keep_every_key_and_value() -> None:
    keep = {"heads": torch.tensor([0, 3, 4, 7])}
    qkv, proj = lookup(LAYER + "self_attention.linear_qkv.weight"), lookup(LAYER + "self_attention.linear_proj.weight")
    assert kept_rows(qkv, 0, SIZES, keep).tolist() == kept_by_hand({0, 3, 4, 7}, {0, 1, 2, 3}, ("q0", "q1", "k", "v"))
    assert kept_rows(proj, 1, SIZES, keep).tolist() == kept_by_hand({0, 3, 4, 7}, {0, 1, 2, 3}, ("q0", "q1"))


def test_kept_groups_take_their_query_heads_along() -> None:
    qkv = lookup(LAYER + "self_attention.linear_qkv.weight")
    keep = {"kv_groups": torch.tensor([1, 2])}
    assert kept_rows(qkv, 0, SIZES, keep).tolist() == kept_by_hand(set(range(8)), {1, 2}, ("q0", "q1", "k", "v"))


def test_a_kept_neuron_keeps_its_gate_and_its_up_row() -> None:
    fc1, fc2 = lookup(LAYER + "mlp.linear_fc1.weight"), lookup(LAYER + "mlp.linear_fc2.weight")
    keep = {"ffn": torch.tensor([1, 19]), "hidden": torch.tensor([0, 23])}
    assert kept_rows(fc1, 0, SIZES, keep).tolist() == [1, 19, 21, 39]
    assert kept_rows(fc2, 1, SIZES, keep).tolist() == [1, 19]
    assert kept_rows(fc1, 1, SIZES, keep).tolist() == kept_rows(fc2, 0, SIZES, keep).tolist() == [0, 23]
    assert kept_rows(fc1, 0, SIZES, {}).tolist() == list(range(40))


@pytest.mark.parametrize("name", ["decoder.layers.3.mlp.linear_fc3.weight", "decoder.layers.x.mlp.linear_fc1.weight"])
def test_a_parameter_without_a_row_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(
        LayoutError,
        match=rf"^{name} has no row in the layout table\. Add one to layout/table\.py; see docs/layout\.md\.$",
    ):
        lookup(name)


def test_layers_are_read_from_names() -> None:
    assert layer_of("decoder.layers.12.mlp.linear_fc1.weight") == 12
    assert layer_of("decoder.final_layernorm.weight") is layer_of("output_layer.weight") is None


def test_every_public_axis_is_somewhere_in_the_table() -> None:
    dims = {dim for param in TABLE.values() for dim in param.dims}
    for axis in PUBLIC_AXES:
        assert any(axis_coords(axis, dim, SIZES, expert=0) is not None for dim in dims), axis


def test_the_table_prints_a_line_for_every_row() -> None:
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert "| `decoder.layers.*.mlp.linear_fc1.weight` | `(gate + up) ffn, hidden` | ffn |" in lines
    assert "| `decoder.final_layernorm.weight` | `hidden` | - |" in lines


# ---- megatron-core's own models


CONFIGS = {
    "untied": ModelConfig(SHAPE),
    "tied": ModelConfig(SHAPE.resized(tied=True)),
    "ungated with LayerNorm": ModelConfig(SHAPE.resized(gated=False, norm_bias=True), norm="LayerNorm"),
    "with biases and norms of q, k": ModelConfig(SHAPE.resized(qkv_bias=True, qk_norm=True)),
}


def mcore_places(topology: Topology, config: ModelConfig) -> dict[str, Any]:
    """Return name -> (local shape, partition_dim, partition_stride), as megatron-core sets them on its parameters."""
    [model] = build(config, topology)
    places = {}
    for shard in named_shards(model):
        tensor: Any = shard.tensor
        split = getattr(tensor, "tensor_model_parallel", False)
        places[shard.name] = (tuple(tensor.shape), *((tensor.partition_dim, tensor.partition_stride) if split else ()))
    return places


def table_places(shape: Shape, rank: int, world: int) -> dict[str, Any]:
    sizes, places = shape.sizes(), {}
    for name in shape.names():
        param = lookup(name)
        local = tuple(len(param.shard_rows(dim, sizes, rank, world)) for dim in range(len(param.dims)))
        places[name] = (local, *((param.tp_dim, param.stride(sizes)) if param.tp else ()))
    return places


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_table_agrees_with_megatron(pool: Pool, tp: int, kind: str) -> None:
    config = CONFIGS[kind]
    for rank, places in enumerate(pool.run(mcore_places, config, tp=tp)):
        assert places == table_places(config.shape, rank, tp)


MIXTURE = SHAPE.resized(ffn=0, experts=8, experts_per_token=2, expert_ffn=10, shared_ffn=12, shared_gate=True)


@pytest.mark.parametrize("ep, tp", [(1, 1), (2, 1), (2, 2), (4, 2), (1, 2)])
def test_the_table_agrees_with_megatron_on_experts(pool: Pool, ep: int, tp: int) -> None:
    ranks = pool.run(mcore_places, ModelConfig(MIXTURE), tp=tp, ep=ep, dp=max(ep // tp, 1), sequence_parallel=tp > 1)
    for rank, places in enumerate(ranks):
        want = {
            name: place
            for name, place in table_places(MIXTURE, rank % tp, tp).items()
            if (expert := expert_of(name)) is None or expert // (8 // ep) == rank % ep
        }
        assert places.keys() == want.keys()
        for name, place in want.items():  # mcore marks experts as split even over one rank
            assert places[name][: 1 if expert_of(name) is not None else None] == place, name


def test_kept_neurons_of_an_expert_are_its_own() -> None:
    sizes, fc1 = MIXTURE.sizes(), lookup(LAYER + "mlp.experts.local_experts.3.linear_fc1.weight")
    keep = {"expert_ffn": torch.tensor([0, 9, 32, 39]), "experts": torch.tensor([0, 3])}
    assert kept_rows(fc1, 0, sizes, keep, expert=3).tolist() == [2, 9, 12, 19]
    assert kept_rows(fc1, 0, sizes, keep, expert=0).tolist() == [0, 9, 10, 19]
    assert kept_rows(lookup(LAYER + "mlp.router.weight"), 0, sizes, keep).tolist() == [0, 3]
    assert (expert_of(LAYER + "mlp.experts.local_experts.3.linear_fc1.weight"), expert_of("x.3.y")) == (3, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_counted_parameters_are_those_of_a_built_model(pool: Pool, kind: str) -> None:
    shape = CONFIGS[kind].shape
    [said] = pool.run(mcore_places, CONFIGS[kind])
    numel = {name: prod(local) for name, (local, *_) in said.items()}
    assert sorted(numel) == sorted(shape.names())
    assert shape.padded_vocab == 256
    padding = (256 - 130) * 24 * (1 if shape.tied else 2)
    assert sum(numel.values()) - padding == parameters(shape)
