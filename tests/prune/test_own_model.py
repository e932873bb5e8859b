"""Plugin: a GPTModel built elsewhere, from mcore's own specs, is scored and cut as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.layout import kept_rows, lookup
from minitron_megatron.model import forward_only, named_shards
from minitron_megatron.model.shards import _canonical
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.records import Plan, Scores
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from tests.engine import norm_column_parallel_linear
from tests.tiny import LAYOUTS, SEQUENCE, samples, share

VOCAB = 132
"""Vocabulary that is not padded to 128: the user's model has its own padding."""


def with_fused_norms(spec: Any) -> Any:
    """Return the spec with Transformer Engine's names: norms are fused into qkv and fc1 as `layer_norm_weight`."""
    from megatron.core.transformer.identity_op import IdentityOp

    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = norm_column_parallel_linear()
    mlp = getattr(layer.mlp, "keywords", vars(layer.mlp))["submodules"]  # a partial in mcore 0.19, a ModuleSpec before
    mlp.linear_fc1 = norm_column_parallel_linear()
    return spec


def their_model(topology: Topology, fused: bool = False) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=8,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.15,
        use_cpu_initialization=True,
        tensor_model_parallel_size=topology.tp,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = with_fused_norms(spec) if fused else spec
    return GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope")


def mask(model: Any, plan: Plan, topology: Topology) -> None:
    """Zero the cut units at the inputs of the layers that write into the residual stream."""
    for shard in named_shards(model):
        if shard.name.endswith(("linear_fc2.weight", "linear_proj.weight")):
            param, sizes = lookup(shard.name), plan.shape.sizes()
            held = param.shard_rows(1, sizes, topology.tp_rank, topology.tp)
            layer = int(shard.name.split(".")[2])
            cut = ~torch.isin(held, kept_rows(param, 1, sizes, plan.keep_at(layer)))
            shard.tensor.data[:, cut] = 0


def cut(topology: Topology) -> tuple[Plan, Tensor, Tensor]:
    """Return (plan, logits of the masked model, logits of the cut model)."""
    model, batches = their_model(topology), share(samples(8), topology)
    plan = choose(score(model, batches, ["ffn", "heads"], topology=topology), ffn=40, heads=4)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(batches[0].tokens, torch.arange(SEQUENCE).expand(2, -1), None)

    mask(model, plan, topology)
    return plan, logits(model), logits(trim(model, plan, topology)[0])


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_their_model_is_scored_and_cut(pool: Pool, layout: str) -> None:
    for plan, masked, pruned in pool.run(cut, **LAYOUTS[layout]):
        assert (plan.target.ffn, plan.target.heads, plan.target.hidden) == (40, 4, 48)
        assert masked.abs().mean() > 0.1
        assert (pruned - masked).abs().max() < 1e-5 * masked.abs().max()


def twins(topology: Topology, sizes: dict[str, int]) -> list[tuple[Scores, Plan, list[Tensor]]]:
    """Return scores, plans and final hidden states after the cut, for the same weights under mcore's local names and
    under Transformer Engine's."""
    torch.manual_seed(3)
    weights: dict[str, Tensor] = {}
    results = []
    for fused in (False, True):
        model, batches = their_model(topology, fused), share(samples(8), topology)
        for shard in named_shards(model):
            if "layernorm" in shard.name:
                weights.setdefault(shard.name, 0.5 + torch.rand(shard.tensor.shape))
            shard.tensor.data.copy_(weights.setdefault(shard.name, shard.tensor.data.clone()))
        scores = score(model, batches, topology=topology)
        plan = choose(scores, **sizes)
        results.append((scores, plan, forward_only(trim(model, plan, topology), batches)))
    return results


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_transformer_engines_names_are_known(pool: Pool, layout: str) -> None:
    for (local, plan, hidden), (fused, fused_plan, fused_hidden) in pool.run(
        twins, {"hidden": 32, "ffn": 40, "heads": 4}, **LAYOUTS[layout]
    ):
        assert set(local.values) == set(fused.values) == {"ffn", "heads", "hidden"}
        for axis, layers in local.values.items():
            for layer, units in layers.items():
                torch.testing.assert_close(fused.values[axis][layer], units, rtol=1e-6, atol=0)
        assert plan.keep == fused_plan.keep
        for want, got in zip(hidden, fused_hidden, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_transformer_engines_grouped_experts_have_the_same_names() -> None:
    assert _canonical("mlp.experts.linear_fc1.weight12") == "mlp.experts.local_experts.12.linear_fc1.weight"
    assert _canonical("mlp.linear_fc1.layer_norm_bias") == "pre_mlp_layernorm.bias"
    assert _canonical("self_attention.linear_qkv.layer_norm_weight") == "input_layernorm.weight"
    assert _canonical("mlp.linear_fc1.weight") == "mlp.linear_fc1.weight"
