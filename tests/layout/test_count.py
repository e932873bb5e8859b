"""Parameter, byte and FLOP counts against published sizes of real models, and against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.layout import Shape, active_parameters, flops_per_token, kv_cache_bytes, parameters


def nemotron(layers: int, hidden: int, heads: int, kv_groups: int, ffn: int, vocab: int) -> Shape:
    return Shape(layers, hidden, ffn, heads, kv_groups, head_dim=128, vocab=vocab, gated=False, norm_bias=True)


def llama(layers: int, hidden: int, heads: int, kv_groups: int, ffn: int, vocab: int) -> Shape:
    return Shape(layers, hidden, ffn, heads, kv_groups, head_dim=128, vocab=vocab)


PUBLISHED = {
    "Nemotron-4 15B": (nemotron(32, 6144, 48, 8, 24576, 256000), 15_628_775_424, 12_483_047_424),
    "Nemotron-3 8B": (nemotron(32, 4096, 32, 32, 16384, 256000), 8_540_135_424, 6_442_983_424),
    "Minitron 8B": (nemotron(32, 4096, 48, 8, 16384, 256000), 8_271_699_968, 6_174_547_968),
    "Minitron 4B": (nemotron(32, 3072, 24, 8, 9216, 256000), 4_190_509_056, 2_617_645_056),
    "Llama-3.1 8B": (llama(32, 4096, 32, 8, 14336, 128256), 8_030_261_248, 6_979_588_096),
    "Llama-3.1-Minitron-4B-Width": (llama(32, 3072, 32, 8, 9216, 128256), 4_512_746_496, 3_724_741_632),
    "Llama-3.1-Minitron-4B-Depth": (llama(16, 4096, 32, 8, 14336, 128256), 4_540_469_248, 3_489_796_096),
    "Mistral NeMo 12B": (llama(40, 5120, 32, 8, 14336, 131072), 12_247_782_400, 10_905_605_120),
    "MN-Minitron-8B": (llama(40, 4096, 32, 8, 11520, 131072), 8_414_105_600, 7_340_363_776),
    "15B cut to 16 layers": (nemotron(16, 6144, 48, 8, 24576, 256000), 9_387_257_856, None),
    "15B cut in width": (nemotron(32, 4096, 32, 8, 16384, 256000), 7_734_829_056, None),
    "15B cut in depth and width, 32 heads": (nemotron(28, 4608, 32, 8, 16384, 256000), 7_908_885_504, None),
    "15B cut in depth and width, 48 heads": (nemotron(28, 4608, 48, 8, 14336, 256000), 7_908_885_504, None),
    "the wrong Minitron-4B of its card": (nemotron(32, 3072, 32, 8, 9216, 256000), 4_391_835_648, None),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_of_published_models(model: str) -> None:
    shape, total, without_embeddings = PUBLISHED[model]
    assert parameters(shape) == total
    if without_embeddings is not None:
        assert total - 2 * shape.vocab * shape.hidden == without_embeddings
    assert parameters(shape.resized(tied=True)) == total - shape.vocab * shape.hidden


TINY = Shape(layers=2, hidden=6, ffn=5, heads=4, kv_groups=2, head_dim=3, vocab=7)
QKV, PROJ, FC1, FC2, EMBEDDING = 6 * 24, 12 * 6, 6 * 10, 5 * 6, 7 * 6


def test_kv_cache_by_hand() -> None:
    # keys and values of 2 groups x 3 channels in each of 2 layers, for 5 sequences of 11 tokens
    assert kv_cache_bytes(TINY, batch=5, context=11) == (2 + 2) * 3 * 2 * 5 * 11 * 2
    assert kv_cache_bytes(TINY, batch=5, context=11, bytes_per_number=1) == 1320


def test_flops_by_hand() -> None:
    # 4 heads x 3 channels x 10 tokens, twice (q.k and p.v), two FLOPs each, halved by causality
    attention = 2 * (4 * 3 * 10 * 2 * 2) // 2
    matrices = 2 * (QKV + PROJ + FC1 + FC2) + EMBEDDING
    assert flops_per_token(TINY, sequence=10) == 2 * matrices + attention
    assert flops_per_token(TINY.resized(tied=True), sequence=10) == 2 * matrices + attention
    ungated = TINY.resized(gated=False)
    assert flops_per_token(ungated, sequence=10) == 2 * (matrices - 2 * 5 * 6) + attention


def test_a_mixture_by_hand() -> None:
    mixture = TINY.resized(ffn=0, experts=8, experts_per_token=2, expert_ffn=5, shared_ffn=10, shared_gate=True)
    router, expert, shared = 8 * 6, 3 * 5 * 6, 3 * 10 * 6 + 6
    rest = 2 * (QKV + PROJ + 2 * 6) + 6 + 2 * EMBEDDING
    assert parameters(mixture) == 2 * (router + 8 * expert + shared) + rest
    assert active_parameters(mixture) == 2 * (router + 2 * expert + shared) + rest
    assert active_parameters(TINY) == parameters(TINY)
    dense = flops_per_token(TINY.resized(ffn=0), sequence=10)
    assert flops_per_token(mixture, sequence=10) == dense + 2 * 2 * (router + 2 * expert + shared)
    assert mixture.units("expert_ffn") == 40 and mixture.units("experts") == 8 and mixture.units("heads") == 4


def test_published_mixtures() -> None:
    mixtral = Shape(32, 4096, 0, 32, 8, 128, 32000, experts=8, experts_per_token=2, expert_ffn=14336)
    assert (parameters(mixtral), active_parameters(mixtral)) == (46_702_792_704, 12_879_925_248)
    qwen3 = Shape(48, 2048, 0, 32, 4, 128, 151936, qk_norm=True, experts=128, experts_per_token=8, expert_ffn=768)
    assert (parameters(qwen3), active_parameters(qwen3)) == (30_532_122_624, 3_353_032_704)


def test_sizes_by_hand() -> None:
    assert TINY.sizes() == {
        "vocab": 128, "hidden": 6, "ffn": 5, "kv_group": 2, "q": 2, "head_dim": 3, "gate": 1,
        "expert": 0, "expert_ffn": 0, "shared_ffn": 0
    }  # fmt: skip
    assert TINY.sizes(padded=False)["vocab"] == 7
    assert TINY.resized(gated=False).sizes()["gate"] == 0
    assert [TINY.resized(vocab=v).padded_vocab for v in (1, 128, 129, 128256, 131072)] == [
        128, 128, 256, 128256, 131072
    ]  # fmt: skip
    assert TINY.axis_size("heads") == 4 and TINY.axis_size("layers") == 2
    assert parameters(TINY) == 2 * (QKV + PROJ + FC1 + FC2 + 2 * 6) + 6 + 2 * EMBEDDING


def test_flops_of_a_step_are_those_that_torch_counts() -> None:
    """torch counts all matrix products of both passes, and attention over all positions, without the causal half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, sequence = Shape(layers=2, hidden=48, ffn=64, heads=8, kv_groups=2, head_dim=8, vocab=131), 32
    config = LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.zeros(3, sequence, dtype=torch.long)
    forward = tokens.numel() * (flops_per_token(shape, sequence) + 2 * shape.layers * shape.heads * 8 * sequence)
    with FlopCounterMode(display=False) as counter:
        logits = LlamaForCausalLM(config)(tokens, use_cache=False).logits
        assert counter.get_total_flops() == forward
        logits.sum().backward()
    assert counter.get_total_flops() == 3 * forward
