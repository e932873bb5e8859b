"""Kernels that attention asks torch for on a GPU, by tensors that say they are on one. Not run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minitron_megatron.model import KVCache
from minitron_megatron.model.spec import CoreAttention
from minitron_megatron.parallel import AttentionContext
from minitron_megatron.testing import tolerance

SEQUENCE, BATCH, HEADS, GROUPS, HEAD_DIM = 12, 2, 8, 2, 16


class OnGpu(Tensor):
    """Tensor on the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@dataclass(frozen=True)
class Call:
    """Arguments of a call of scaled_dot_product_attention."""

    key_heads: int
    grouped: bool
    cudnn: bool
    """Whether cuDNN's kernel may serve it."""
    cudnn_is_first: bool


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Calls of attention on what torch says is a Hopper GPU."""
    asked: list[Call] = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    def record(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, enable_gqa: bool, **options: Any) -> Tensor:
        first = torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
        asked.append(Call(k.shape[1], enable_gqa, torch.backends.cuda.cudnn_sdp_enabled(), first))
        plain = (each.as_subclass(Tensor) for each in (q, k, v))
        return original(*plain, mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return asked


def parts(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries, keys and values: [sequence, batch, heads, head_dim]."""
    draw = torch.Generator().manual_seed(4)
    return [
        torch.randn(SEQUENCE, BATCH, heads, HEAD_DIM, generator=draw).to(dtype) for heads in (HEADS, GROUPS, GROUPS)
    ]


def attention() -> CoreAttention:
    return CoreAttention(SimpleNamespace(window_size=None))  # type: ignore[arg-type]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [each.as_subclass(OnGpu) for each in tensors]


def test_fp32_repeats_keys_for_the_kernel_that_refuses_grouped_heads(calls: list[Call]) -> None:
    want = attention()(*parts(), None)
    got = attention()(*on_gpu(parts()), None)
    attention()(*on_gpu(parts(torch.bfloat16)), None)
    assert [(call.key_heads, call.grouped) for call in calls] == [(GROUPS, True), (HEADS, False), (GROUPS, True)]
    torch.testing.assert_close(got.as_subclass(Tensor), want, **tolerance())


def test_repeated_keys_have_the_gradients_of_all_their_heads(calls: list[Call]) -> None:
    found = []
    for place in (list, on_gpu):
        tensors = [each.requires_grad_() for each in parts()]
        attention()(*place(tensors), None).square().sum().backward()
        found.append([each.grad for each in tensors])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **tolerance())


def test_shapes_that_vary_get_no_plan_of_cudnns(calls: list[Call]) -> None:
    """Documents and decoding give attention new shapes all the time; other calls may take the faster kernel."""
    documents = AttentionContext(documents=torch.tensor([[0] * 5 + [1] * 7, [2] * 12]))
    cache = KVCache(rows=BATCH, room=SEQUENCE)
    for context in (documents, AttentionContext(cache=cache)):
        attention()(*on_gpu(parts(torch.bfloat16)), context.as_mask())
    assert len(calls) == 4 and not any(call.cudnn for call in calls)
    attention()(*on_gpu(parts(torch.bfloat16)), None)
    assert calls[-1].cudnn


def test_cudnns_attention_comes_first_where_torch_takes_it(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on other GPUs, not with an older cuDNN, and not where a caller leaves it out."""
    attention()(*on_gpu(parts(torch.bfloat16)), None)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention()(*on_gpu(parts(torch.bfloat16)), None)
    assert [(call.cudnn, call.cudnn_is_first) for call in calls] == [(True, True), (False, False)]
    for owner, name, value in ((torch.cuda, "get_device_capability", (8, 0)), (torch.backends.cudnn, "version", 90100)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda value=value: value)
            attention()(*on_gpu(parts(torch.bfloat16)), None)
        assert not calls[-1].cudnn_is_first
