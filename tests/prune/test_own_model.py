"""The plugin's promise: a GPTModel that somebody else built, from mcore's own specs, is scored and cut as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.layout import kept_rows, lookup
from minitron_megatron.model import named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.records import Plan
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from tests.tiny import LAYOUTS, SEQUENCE, samples, share

VOCAB = 132
"""Not padded to 128: their model, their padding."""


def their_model(topology: Topology) -> Any:
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
    return GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope")


def mask(model: Any, plan: Plan, topology: Topology) -> None:
    """Zeroes what the plan cuts, at the inputs of the layers that write into the residual stream."""
    for shard in named_shards(model):
        if shard.name.endswith(("linear_fc2.weight", "linear_proj.weight")):
            param, sizes = lookup(shard.name), plan.shape.sizes()
            held = param.shard_rows(1, sizes, topology.tp_rank, topology.tp)
            layer = int(shard.name.split(".")[2])
            cut = ~torch.isin(held, kept_rows(param, 1, sizes, plan.keep_at(layer)))
            shard.tensor.data[:, cut] = 0


def cut(topology: Topology) -> tuple[Plan, Tensor, Tensor]:
    """(plan, logits of the masked model, logits of the cut one)."""
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
