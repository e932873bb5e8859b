"""A model with a sliding window computes and exports the same as transformers, at every length and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.convert import load_hf, read_config, save_hf
from minitron_megatron.convert.check import logits_of
from minitron_megatron.data import Batch
from minitron_megatron.errors import CheckpointError
from minitron_megatron.evaluate import Predictor
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import make_folder
from .test_errors import with_config
from .test_round_trip import logits_of_transformers, some_tokens

LENGTH = 48
EVERY_LAYER = {"use_sliding_window": True, "max_window_layers": 0}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {}, "phi3": {}, "mixtral": {}, "qwen2": EVERY_LAYER, "qwen3-tied": EVERY_LAYER, "qwen3_moe": EVERY_LAYER,
}  # fmt: skip


def read_and_written(topology: Topology, folder: Path, export: Path) -> list[Tensor | None]:
    tokens = some_tokens(509, LENGTH)
    model = load_hf(folder, topology)
    save_hf(model, export, topology)
    batch = Batch(tokens, tokens, tokens >= 0)
    return [logits_of(each, batch, topology) for each in (model, load_hf(export, topology))]


@pytest.mark.parametrize("kind", WINDOWED)
def test_logits_beyond_the_window_equal_those_of_transformers(pool: Pool, tmp_path: Path, kind: str) -> None:
    folder, export = tmp_path / "model", tmp_path / "export"
    make_folder(folder, kind, sliding_window=16, **WINDOWED[kind])
    assert (read_config(folder).window, read_config(folder).longest) == (16, 16)
    want = logits_of_transformers(folder, some_tokens(509, LENGTH))
    for got in pool.run(read_and_written, folder, export)[0]:
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of_transformers(export, some_tokens(509, LENGTH)), want)
    assert read_config(export).window == 16


@pytest.mark.parametrize("layout", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=["tp2-sp", "pp2"])
def test_a_window_is_the_same_at_every_layout(pool: Pool, tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "model", "mistral", sliding_window=7)
    want = logits_of_transformers(folder, some_tokens(509, LENGTH))
    got = pool.run(read_and_written, folder, tmp_path / "export", **layout)[0][0]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def widths(topology: Topology, folder: Path) -> list[Tensor | None]:
    found = []
    for width in (LENGTH - 1, LENGTH, None):
        with_config(folder, sliding_window=width)
        tokens = some_tokens(509, LENGTH)
        found.append(logits_of(load_hf(folder, topology), Batch(tokens, tokens, tokens >= 0), topology))
    return found


def test_a_window_counts_the_token_itself(pool: Pool, tmp_path: Path) -> None:
    shorter, just, none = pool.run(widths, make_folder(tmp_path / "model", "mistral", sliding_window=7))[0]
    assert torch.equal(just, none)
    changed = (shorter != none).any(-1).any(0)
    assert changed[-1] and not changed[:-1].any()


def greedy(topology: Topology, folder: Path) -> list[list[int]]:
    prompts = [row[:length].tolist() for row, length in zip(some_tokens(509, 30), (30, 11), strict=True)]
    return Predictor(load_hf(folder, topology), topology).continuations(prompts, 6)


def test_generation_keeps_within_the_window(pool: Pool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "model", "mistral", sliding_window=9)
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = []
    for row, length in zip(some_tokens(509, 30), (30, 11), strict=True):
        text = row[:length]
        for _ in range(6):
            with torch.no_grad():
                text = torch.cat([text, truth(text[None]).logits[0, -1:].argmax(-1)])
        want.append(text[length:].tolist())
    assert pool.run(greedy, folder)[0] == want
    assert pool.run(greedy, folder, tp=2, pp=2) == [want] * 4


def test_context_parallel_ranks_and_documents_keep_within_the_window() -> None:
    from minitron_megatron.model.spec import _by_document, _by_piece

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 24, 8) for heads in (4, 2, 2))
    at = torch.arange(24)
    documents = (at >= 10).long()
    near = (at[:, None] >= at) & (at[:, None] - at < 5)
    naive = lambda seen: F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)  # noqa: E731
    same = documents[:, None] == documents
    torch.testing.assert_close(_by_document(5, q, k, v, documents), naive(near & same))
    pieces = [(18, 24, 0), (0, 6, 0)]  # one rank's last and first chunk, each with the keys before its end
    local = torch.cat([q[:, :, 18:24], q[:, :, 0:6]], dim=2)
    want = naive(near)
    torch.testing.assert_close(_by_piece(5, local, k, v, pieces), torch.cat([want[:, :, 18:24], want[:, :, 0:6]], 2))


@pytest.mark.parametrize(
    "keys", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"] * 2}]
)
def test_windows_of_some_layers_are_refused_by_name(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "model", "qwen2", num_hidden_layers=4)
    with_config(folder, **{"layer_types": "gone", "use_sliding_window": True, "sliding_window": 9, **keys})
    with pytest.raises(CheckpointError, match=r"use_sliding_window: True, in \d layers of 4"):
        read_config(folder)
