"""Transformer Engine's names and functions without Transformer Engine, which needs a GPU.

Stand-ins that lie in the places where megatron-core looks for its modules. Built on `meta` they bear no marks, as
Transformer Engine's do not; what they compute is plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
"""What mcore reads of a parameter's place among the ranks."""


def unmark(module: nn.Module) -> None:
    for parameter in module.parameters():
        for mark in MARKS:
            parameter.__dict__.pop(mark, None)


def marks(parameter: Any) -> dict[str, Any]:
    """What bears on anything: mcore's own modules also say of what is not split that it is not."""
    found = {mark: getattr(parameter, mark) for mark in MARKS if getattr(parameter, mark, False)}
    return found if found.get("tensor_model_parallel") else {k: v for k, v in found.items() if "partition" not in k}


def norm_column_parallel_linear() -> Any:
    """`TELayerNormColumnParallelLinear`: the norm lives in it, as `layer_norm_weight` and `layer_norm_bias`."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class NormColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
            super().__init__(input_size, output_size, config=config, **more)
            self.eps, self.centred = config.layernorm_epsilon, int(config.layernorm_zero_centered_gamma)
            self.layer_norm_weight = nn.Parameter(torch.ones(input_size))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            self.layer_norm_bias = (
                nn.Parameter(torch.zeros(input_size)) if config.normalization == "LayerNorm" else None
            )

        def forward(self, states: Tensor, *args: Any, **more: Any) -> Any:
            weight, bias = self.layer_norm_weight + self.centred, self.layer_norm_bias
            if bias is None:
                normed = F.rms_norm(states, weight.shape, weight, self.eps)
            else:
                normed = F.layer_norm(states, weight.shape, weight, bias, self.eps)
            return super().forward(normed, *args, **more)

    return NormColumnParallelLinear


def _unmarked(kind: Any) -> Any:
    """On `meta`, without marks, whatever `use_cpu_initialization` says, and with an `_extra_state` as version 2 has."""

    class Unmarked(kind):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            for name, parameter in [*self.named_parameters()]:
                setattr(self, name, nn.Parameter(parameter.to("meta")))
            unmark(self)

        def get_extra_state(self) -> Tensor:
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state: Tensor | None) -> None:
            assert state is None or not state.numel()

    return Unmarked


@contextmanager
def installed() -> Iterator[None]:
    """Within it megatron-core finds the stand-ins."""
    from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from minitron_megatron.model.spec import Norm

    there = {
        "TEColumnParallelLinear": _unmarked(ColumnParallelLinear),
        "TERowParallelLinear": _unmarked(RowParallelLinear),
        "TELayerNormColumnParallelLinear": _unmarked(norm_column_parallel_linear()),
        "TENorm": _unmarked(Norm),
        "is_te_min_version": lambda *_, **__: True,
    }
    with (
        _replaced(transformer_engine_spec_provider, there),
        _replaced(transformer_engine, {"TENorm": there["TENorm"], "HAVE_TE": True}),
        _replaced(gpt_layer_specs, {"TESpecProvider": transformer_engine_spec_provider.TESpecProvider}),
    ):
        yield


@contextmanager
def _replaced(module: Any, names: dict[str, Any]) -> Iterator[None]:
    before = dict(vars(module))
    try:
        vars(module).update(names)
        yield
    finally:
        for name in names:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)
