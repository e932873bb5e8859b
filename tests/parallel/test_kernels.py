"""Functions that are compiled on a GPU: torch.compile takes each as a whole, and rotary embeddings have their gradient.

Not run on a GPU; `tests/gpu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.losses.divergences import _forward_kl
from minitron_megatron.losses.vocab import _shifted
from minitron_megatron.parallel.kernels import one_kernel, rotated
from minitron_megatron.testing import tolerance


def plain_rotation() -> Callable[..., Tensor]:
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils._apply_rotary_pos_emb_bshd


def drawn(*sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def angles(positions: int, samples: int, rotated_channels: int) -> Tensor:
    """Return angles as mcore makes them: twice those of half the channels, here of different positions a sample."""
    return 3 * drawn(positions, samples, 1, rotated_channels // 2, seed=2).repeat(1, 1, 1, 2)


ARGUMENTS: dict[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]] = {
    _forward_kl: lambda rows: (drawn(rows, 50).log_softmax(-1), drawn(rows, 50, seed=2).log_softmax(-1)),
    _shifted: lambda rows: (drawn(rows, 50), drawn(rows, seed=2)),
}


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_a_function_compiles_as_a_whole_for_any_sizes(function: Callable[..., Any]) -> None:
    """Without the last step, which makes kernels and takes a minute: in one graph, with the same results."""
    graph = torch.compile(function.__wrapped__, dynamic=True, fullgraph=True, backend="aot_eager")  # type: ignore[attr-defined]
    for rows in (7, 3):
        arguments = ARGUMENTS[function](rows)
        for got, want in zip(
            graph(*(each.clone() for each in arguments)),
            function(*(each.clone() for each in arguments)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, **tolerance())


def test_a_function_is_compiled_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr("minitron_megatron.parallel.kernels.compiled", lambda function: lambda *args: "compiled")
    double = one_kernel(lambda states: 2 * states)
    assert double(torch.ones(1)) == 2
    assert double(torch.ones(1).as_subclass(OnGpu)) == "compiled"


@pytest.mark.parametrize("channels", [16, 8], ids=["all channels", "half of the channels"])
def test_rotary_embeddings_have_the_gradient_of_mcores_function(channels: int) -> None:
    states, turned = drawn(5, 3, 4, 16).double().requires_grad_(), angles(5, 3, channels).double()
    upstream = drawn(5, 3, 4, 16, seed=3).double()
    found = []
    for how in (plain_rotation(), lambda *args, **options: rotated(plain_rotation(), *args, **options)):
        out = how(states, turned, mscale=1.3)
        found.append((out, *torch.autograd.grad(out, states, upstream)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


def test_rotary_embeddings_keep_their_angles_alone() -> None:
    """Without the patch, mcore keeps cosines and sines of its own in each layer, and rotates in six kernels."""
    from megatron.core.models.common.embeddings import rope_utils

    from minitron_megatron.parallel.mcore_patches import patch_mcore
    from minitron_megatron.parallel.patch import unpatched

    patch_mcore()
    states, turned = drawn(5, 2, 4, 16).requires_grad_(), angles(5, 1, 16)

    def kept() -> list[Tensor]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rope_utils._apply_rotary_pos_emb_bshd(states, turned)
        return found

    assert [each.data_ptr() for each in kept()] == [turned.data_ptr()]
    with unpatched(rope_utils, "_apply_rotary_pos_emb_bshd"):
        assert len(kept()) == 2 and turned.data_ptr() not in [each.data_ptr() for each in kept()]
