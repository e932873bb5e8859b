"""The layer spec changes neither a model's parameters nor its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import RecipeError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, Spec, assign, build, check_spec, fill_initial, named_shards
from minitron_megatron.model.build import mark_parallel
from minitron_megatron.parallel import Topology, final_hidden
from minitron_megatron.testing import Pool, tolerance
from tests.engine import installed, marks, unmark

SHAPE = Shape(layers=3, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=100)
MIXTURE = Shape(
    layers=2,
    hidden=32,
    ffn=0,
    heads=4,
    kv_groups=2,
    head_dim=8,
    vocab=100,
    experts=4,
    experts_per_token=2,
    expert_ffn=24,
)
CONFIGS = {
    "dense": ModelConfig(SHAPE),
    "biases and norms of q, k": ModelConfig(SHAPE.resized(qkv_bias=True, qk_norm=True)),
    "LayerNorm1p": ModelConfig(SHAPE.resized(norm_bias=True), norm="LayerNorm", zero_centered_norm=True),
    "experts": ModelConfig(MIXTURE),
}
LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp2-sp": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}

each_config = pytest.mark.parametrize("kind", CONFIGS)


def test_transformer_engine_is_asked_for_in_words_where_it_is_not() -> None:
    pytest.importorskip("megatron.core")
    check_spec("local")
    if torch.cuda.is_available():
        pytest.skip("Transformer Engine may be there")
    with pytest.raises(RecipeError, match=r"spec te needs Transformer Engine.* set spec to local"):
        check_spec("te")


# ---- mcore's attributes of parameters


def marked(topology: Topology, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the tensor-parallel attributes of this rank's parameters: mcore's own, ours where there are none, and
    those with the te spec."""
    [own] = build(config, topology)
    first = {shard.name: marks(shard.tensor) for shard in named_shards(own)}
    unmark(own)
    bare = {shard.name: marks(shard.tensor) for shard in named_shards(own)}
    assert not any(bare.values())
    mark_parallel(own)
    again = {shard.name: marks(shard.tensor) for shard in named_shards(own)}
    with installed():
        [te] = build(config, topology, spec="te")
    return first, again, {shard.name: marks(shard.tensor) for shard in named_shards(te)}


@each_config
@pytest.mark.parametrize("layout", ["tp1", "tp2-sp"])
def test_parameters_are_marked_as_megatron_marks_its_own(pool: Pool, kind: str, layout: str) -> None:
    for own, ours, te in pool.run(marked, CONFIGS[kind], **LAYOUTS[layout]):
        assert any(mark.get("tensor_model_parallel") for mark in own.values())
        for name, wanted in own.items():
            if ".experts." not in name and "router" not in name:  # not split by tp, and mcore sets their attributes
                assert ours[name] == wanted, name
                assert te[name] == wanted, name


# ---- functions


def hidden_of(topology: Topology, config: ModelConfig, spec: Spec, tokens: Tensor) -> tuple[list[str], Tensor]:
    with installed():
        chunks = build(config, topology, spec=spec)
    fill_initial(chunks, topology, 1)
    for shard in named_shards(chunks):
        if "norm" in shard.name:
            assign(shard, torch.linspace(0.5, 1.5, len(shard.tensor)))
    with torch.no_grad():
        return sorted(shard.name for shard in named_shards(chunks)), final_hidden(chunks[0], tokens)


@each_config
@pytest.mark.parametrize("layout", ["tp1", "tp2-sp"])
def test_names_and_hidden_states_are_those_of_the_local_spec(pool: Pool, kind: str, layout: str) -> None:
    tokens = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    local = pool.run(hidden_of, CONFIGS[kind], "local", tokens, **LAYOUTS[layout])
    te = pool.run(hidden_of, CONFIGS[kind], "te", tokens, **LAYOUTS[layout])
    for (names, want), (te_names, got) in zip(local, te, strict=True):
        assert names == te_names
        torch.testing.assert_close(got, want, **tolerance())


def kinds(topology: Topology) -> list[set[str]]:
    found = []
    for spec in ("local", "te"):
        with installed():
            [chunk] = build(ModelConfig(SHAPE), topology, spec=spec)
        found.append({type(module).__mro__[1].__name__ for module in chunk.decoder.modules()})
    return found


def test_the_te_spec_is_transformer_engines_modules(pool: Pool) -> None:
    [[local, te]] = pool.run(kinds)
    assert "NormColumnParallelLinear" in te and "NormColumnParallelLinear" not in local
