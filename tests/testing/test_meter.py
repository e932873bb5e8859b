"""Memory meter against peaks counted by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_megatron.testing import LivePeak, live_peak

MIB = 2**20


def mib(n: int = 1) -> Tensor:
    return torch.ones(n * MIB // 4)


def test_a_chain_of_operations_holds_two_tensors_at_once() -> None:
    def chain() -> None:
        x = mib()
        for _ in range(5):
            x = x + 1

    assert live_peak(chain) == 2 * MIB


def test_views_and_in_place_operations_weigh_nothing() -> None:
    def views() -> None:
        x = mib()
        kept = [x.view(2, -1), x[10:], x.t() if x.dim() == 2 else x.unsqueeze(0)]
        kept[0].add_(1)
        x.mul_(2)

    assert live_peak(views) == MIB


def test_a_view_alone_keeps_its_whole_storage_alive() -> None:
    def keeps_a_corner() -> None:
        corner = mib(3)[:1]
        mib(1)
        del corner
        mib(2)

    assert live_peak(keeps_a_corner) == 4 * MIB


def test_what_lived_before_is_the_start_and_makes_room_when_freed() -> None:
    held = [mib(4)]
    with LivePeak() as meter:
        held.clear()
        mib(3)
    assert meter.start >= 4 * MIB
    assert meter.extra == 0
    assert meter.now == meter.start - 4 * MIB

    held = [mib(4)]
    with LivePeak() as meter:
        held.append(mib(3))
    assert meter.extra == 3 * MIB


def test_replacing_a_parameters_data_frees_the_old() -> None:
    weights = [torch.nn.Parameter(mib(2)) for _ in range(4)]

    def halve() -> None:
        for weight in weights:
            weight.data = weight.data[: weight.numel() // 2].clone()

    assert live_peak(halve) == MIB


def test_backward_is_seen() -> None:
    x = mib().requires_grad_()

    def held_for_backward() -> None:
        y = x
        for _ in range(4):
            y = y.exp()  # each output is saved for backward
        y.backward(torch.ones_like(y))

    with LivePeak() as meter:
        held_for_backward()
        gradient_is_alive = meter.now - meter.start
    # at the second backward step: four outputs (`y` is the last), the given gradient, and the step's input and output
    assert meter.extra == 7 * MIB
    assert gradient_is_alive == MIB
    assert x.grad is not None


def test_a_function_of_ones_own_is_seen_inside_its_backward() -> None:
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            scratch = [mib(5), mib(5)]
            return gradient + scratch[0][0] - scratch[1][0]

    x = mib().requires_grad_()
    assert 11 * MIB <= live_peak(lambda: Wasteful.apply(x).sum().backward()) < 13 * MIB


def test_meta_weighs_nothing_and_loaded_tensors_count_once_touched() -> None:
    import numpy

    assert live_peak(lambda: torch.ones(MIB, device="meta") + 1) == 0
    assert live_peak(lambda: torch.from_numpy(numpy.ones(MIB, dtype="float32")).sum()) == 4 * MIB + 4
