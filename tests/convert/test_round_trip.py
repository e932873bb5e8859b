"""Hugging Face -> Megatron -> Hugging Face preserves every byte at every layout.

The Megatron model computes the same as transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_megatron.convert import load, load_hf, model_hash, save_hf
from minitron_megatron.model import forward_only, named_shards, output_weight, shape_of
from minitron_megatron.parallel import Topology, gather_sequence
from minitron_megatron.testing import Pool

from .conftest import KINDS, MIXTURES, make_folder

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "ep2": {"ep": 2, "dp": 2},
    "ep2-tp2": {"ep": 2, "tp": 2, "sequence_parallel": True},
    "ep2-pp2": {"ep": 2, "pp": 2, "dp": 2},
    "ep4-tp2": {"ep": 4, "tp": 2, "dp": 2, "sequence_parallel": True},
}


def fits(kind: str, layout: str) -> dict[str, Any]:
    """Return the layout for a model of this kind: an MoE model needs sequence parallelism with tp."""
    sizes = LAYOUTS[layout]
    return {**sizes, "sequence_parallel": True} if kind in MIXTURES and "tp" in sizes else sizes


KINDS_AND_LAYOUTS = [
    ("llama", "tp1"),
    *((kind, layout) for kind in KINDS if kind not in MIXTURES for layout in ("tp2-sp", "tp2-pp2")),
    *(("qwen2_moe", layout) for layout in LAYOUTS),  # the one with shared experts
    *((kind, layout) for kind in ("mixtral", "qwen3_moe") for layout in ("ep2-tp2", "ep2-pp2")),
]
HfFolder = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bytes(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def there_and_back(topology: Topology, source: Path, target: Path, dtype: torch.dtype) -> str:
    model = load_hf(source, topology, dtype)
    save_hf(model, target, topology)
    return model_hash(model, topology)


def test_bf16_comes_back_and_fp32_is_rounded_to_it_on_demand(pool: Pool, hf_folder: HfFolder, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "bf16", "llama", torch.bfloat16)
    pool.run(there_and_back, source, tmp_path / "back", torch.bfloat16, tp=2)
    assert_same_bytes(tensors_of(tmp_path / "back"), tensors_of(source))
    pool.run(there_and_back, hf_folder("llama"), tmp_path / "rounded", torch.bfloat16, tp=2)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(hf_folder("llama")).items()}
    assert_same_bytes(tensors_of(tmp_path / "rounded"), rounded)


def test_a_rank_that_holds_nothing_but_padding(pool: Pool, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "small", "llama", vocab_size=60)
    pool.run(there_and_back, source, tmp_path / "back", torch.float32, tp=2)
    assert_same_bytes(tensors_of(tmp_path / "back"), tensors_of(source))


# ---- the Megatron model


@dataclass
class Batch:
    tokens: Tensor
    mask: Tensor


def logits(topology: Topology, folder: Path, tokens: Tensor) -> Tensor | None:
    """Return this rank's part of the logits [s, b, v], vocabulary padding included; None before the last stage and on
    other replicas."""
    model = load_hf(folder, topology)
    hidden = forward_only(model, [Batch(tokens, tokens > 0)])
    if not topology.is_last_stage or topology.dp_rank:
        return None
    states = gather_sequence(hidden[0], topology.tp_group) if topology.sequence_parallel else hidden[0]
    return states @ output_weight(model[-1]).detach().t()


def logits_of_transformers(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


def some_tokens(vocab: int, length: int = 48) -> Tensor:
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(parts: list[Tensor | None], want: Tensor) -> None:
    got = torch.cat([part for part in parts if part is not None], dim=-1).transpose(0, 1)
    vocab = want.shape[-1]
    assert want.std() > 0.5
    assert (got[..., :vocab] - want).abs().max() < 1e-4
    assert not got[..., vocab:].any()


def both(topology: Topology, source: Path, target: Path, tokens: Tensor) -> Tensor | None:
    there_and_back(topology, source, target, torch.float32)
    return logits(topology, source, tokens)


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
def test_every_byte_comes_back_and_logits_equal_those_of_transformers(
    pool: Pool, hf_folder: HfFolder, tmp_path: Path, kind: str, layout: str
) -> None:
    source, tokens = hf_folder(kind), some_tokens(509)
    parts = pool.run(both, source, tmp_path / "back", tokens, **fits(kind, layout))
    want = tensors_of(source)
    assert ("lm_head.weight" in want) == ("tied" not in kind)
    assert want["model.embed_tokens.weight"].shape == (509, 40)
    assert_same_bytes(tensors_of(tmp_path / "back"), want)
    assert_same_logits(parts, logits_of_transformers(source, tokens))


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "tp2-pp2"])
def test_logits_of_a_trained_model_equal_those_of_transformers(pool: Pool, assets: Path, layout: str) -> None:
    folder, tokens = assets / "hf" / "stories260K", some_tokens(512)
    assert_same_logits(pool.run(logits, folder, tokens, **LAYOUTS[layout]), logits_of_transformers(folder, tokens))


# ---- bytes read by a rank


def bytes_read_and_held(topology: Topology, folder: Path) -> tuple[int, int]:
    opened = []

    class Counted(load.Weights):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            opened.append(self)

    original, load.Weights = load.Weights, Counted
    try:
        model = load_hf(folder, topology)
    finally:
        load.Weights = original
    held = sum(shard.tensor.numel() * shard.tensor.element_size() for shard in named_shards(model))
    assert shape_of(model[0]).vocab == 509
    return sum(weights.bytes_read for weights in opened), held


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("kind", ["llama", "mistral-tied"])
def test_a_rank_reads_little_more_than_it_holds(
    pool: Pool, hf_folder: HfFolder, kind: str, layout: dict[str, int]
) -> None:
    ranks = pool.run(bytes_read_and_held, hf_folder(kind), **layout)
    for read, held in ranks:
        assert 0.9 * held < read <= 1.1 * held
