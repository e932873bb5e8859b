"""Stand-ins for Transformer Engine, which needs a GPU: the same names, computed in plain torch.

They are installed where megatron-core looks for Transformer Engine's modules. Like those, they set no tensor-parallel
attributes on parameters when built on `meta`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
"""Attributes of a parameter by which mcore knows how it is sharded."""


def unmark(module: nn.Module) -> None:
    for parameter in module.parameters():
        for mark in MARKS:
            parameter.__dict__.pop(mark, None)


def marks(parameter: Any) -> dict[str, Any]:
    """Return the attributes that have an effect; mcore also sets them to false, or to defaults without a split."""
    found = {mark: getattr(parameter, mark) for mark in MARKS if getattr(parameter, mark, False)}
    return found if found.get("tensor_model_parallel") else {k: v for k, v in found.items() if "partition" not in k}


def norm_column_parallel_linear() -> Any:
    """Return a stand-in for `TELayerNormColumnParallelLinear`, with `layer_norm_weight` and `layer_norm_bias`."""
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
    """Return a subclass that is always on `meta`, without marks, and has an `_extra_state` like TE 2."""

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
    """Make megatron-core find the stand-ins inside the block."""
    from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from minitron_megatron.model.spec import Norm

    stand_ins = {
        "TEColumnParallelLinear": _unmarked(ColumnParallelLinear),
        "TERowParallelLinear": _unmarked(RowParallelLinear),
        "TELayerNormColumnParallelLinear": _unmarked(norm_column_parallel_linear()),
        "TENorm": _unmarked(Norm),
        "is_te_min_version": lambda *_, **__: True,
    }
    with (
        _replaced(transformer_engine_spec_provider, stand_ins),
        _replaced(transformer_engine, {"TENorm": stand_ins["TENorm"], "HAVE_TE": True}),
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
