"""Operations on fake tensors that ran before on inputs of the same layout: what they return and what they cost.

torch needs about a millisecond of the CPU for an operation on fake tensors. What it returns depends only on the
layouts and numbers that it was given, and a model runs the same ones in each layer and each micro-batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .clock import Clock
from .operations import Args, Kwargs
from .values import LIKE, mutated

__all__ = ["Call", "Cost", "Known", "Memo", "call_of"]

aten = torch.ops.aten
NEVER = {aten.topk.default, aten.eq.Tensor, aten.ne.Scalar, aten._fused_sdp_choice.default, aten.equal.default}
"""Operations whose results are assumed, or read by the host."""


Layout = tuple[torch.Size, tuple[int, ...], int | torch.SymInt]
"""Shape, strides and offset of a tensor in its storage."""


class Cost(NamedTuple):
    """Cost of an operation; one without a kernel has none."""

    name: str
    flops: int
    touched: int
    resource: str
    seconds: float


class Call(NamedTuple):
    """An operation with its inputs."""

    key: Hashable
    """Equal for calls that return and cost the same."""
    inputs: list[FakeTensor]
    """The fake tensors, in the order of the arguments."""


class _OnHost(Exception):
    """A tensor on the CPU, whose numbers may matter."""


class _Output(NamedTuple):
    """Result of an operation: an input itself, a view of one, a new tensor, or a constant."""

    itself: int | None = None
    view_of: int | None = None
    layout: Layout | None = None
    dtype: torch.dtype | None = None
    constant: float | None = None

    @property
    def is_new(self) -> bool:
        return self.layout is not None and self.view_of is None


class Known(NamedTuple):
    """Results and cost of an operation, by its inputs."""

    outputs: tuple[_Output, ...]
    news: tuple[int, ...]
    """Numbers of the outputs that have a storage of their own."""
    container: type | None
    written: tuple[int, ...]
    """Numbers of the inputs that it writes to."""
    cost: Cost | None


def call_of(func: OpOverload, args: Args, kwargs: Kwargs) -> Call | None:
    """Return a call that a memo may know; None: it has no fake tensor, or one on the CPU, or is never remembered."""
    inputs: list[FakeTensor] = []
    if not _remembered(func):
        return None
    try:
        key: tuple[Hashable, ...] = (func, *(_described(each, inputs) for each in args))
        if kwargs:
            key = (*key, *((name, _described(each, inputs)) for name, each in kwargs.items()))
    except _OnHost:
        return None
    if not inputs:
        return None
    if len(inputs) > 1:
        storages = [each.untyped_storage()._cdata for each in inputs]
        key = (*key, *map(storages.index, storages))
    return Call(key, inputs)


def _described(value: object, inputs: list[FakeTensor]) -> Hashable:
    """Return what a result may depend on, and append fake tensors to `inputs`. Raises _OnHost for one on the CPU."""
    if isinstance(value, Tensor):
        if not isinstance(value, FakeTensor):
            raise _OnHost
        inputs.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_described(each, inputs) for each in value)
    return type(value), value


_rules: dict[OpOverload, bool] = {}


def _remembered(func: OpOverload) -> bool:
    found = _rules.get(func)
    if found is None:
        own_name = func._schema.name.split("::")[1]
        found = func.namespace == "aten" and func not in NEVER and own_name not in LIKE
        _rules[func] = found = found and torch.Tag.inplace_view not in func.tags
    return found


_known_by: dict[Clock, dict[Hashable, Known]] = {}


class Memo:
    """Results of operations by their calls."""

    def __init__(self, mode: FakeTensorMode, clock: Clock) -> None:
        """clock: gives the costs. Rehearsals of a process with the same clock share what they know."""
        self._known = _known_by.setdefault(clock, {})
        self._device = torch.device("cuda", 0)
        self._attributes = FakeTensor(mode, torch.empty(0, device="meta"), self._device).__dict__

    def find(self, call: Call) -> Known | None:
        return self._known.get(call.key)

    def learn(self, call: Call, func: OpOverload, args: Args, kwargs: Kwargs, out: object, cost: Cost | None) -> None:
        """Remember what a call returned and cost, unless a result is on the CPU or of another kind."""
        container = type(out) if isinstance(out, (list, tuple)) else None
        if container not in (None, list, tuple):
            return
        values: tuple[Any, ...] = tuple(out) if isinstance(out, (list, tuple)) else (out,)
        outputs = tuple(each for each in (_output_of(value, call.inputs) for value in values) if each is not None)
        news = tuple(at for at, each in enumerate(outputs) if each.is_new)
        if len(outputs) < len(values) or len({values[at].untyped_storage()._cdata for at in news}) < len(news):
            return
        at = {id(each): index for index, each in enumerate(call.inputs)}
        written = tuple(at[id(each)] for each in mutated(func, args, kwargs))
        self._known[call.key] = Known(outputs, news, container, written, cost)

    def made(self, known: Known, inputs: Sequence[FakeTensor]) -> list[Any]:
        """Return the results of an operation for these inputs."""
        return [self._made(each, inputs) for each in known.outputs]

    def _made(self, output: _Output, inputs: Sequence[FakeTensor]) -> FakeTensor | float | None:
        if output.itself is not None:
            return inputs[output.itself]
        if output.layout is None:
            return output.constant
        shape, stride, offset = output.layout
        if output.view_of is None:
            elements = torch.empty_strided(shape, stride, dtype=output.dtype, device="meta")
        else:
            elements = torch.empty(0, dtype=output.dtype, device="meta")
            elements.set_(inputs[output.view_of].untyped_storage(), offset, shape, stride)
        made: Any = Tensor._make_subclass(
            FakeTensor, elements, False, dispatch_device=True, device_for_backend_keys=self._device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(self._attributes)  # quicker than FakeTensor(...), which makes the same ones
        return made


def _output_of(value: object, inputs: Sequence[FakeTensor]) -> _Output | None:
    if not isinstance(value, Tensor):
        return _Output(constant=value) if value is None or isinstance(value, (int, float)) else None
    if not isinstance(value, FakeTensor) or value.device.type != "cuda":
        return None
    for at, each in enumerate(inputs):
        if value is each:
            return _Output(itself=at)
    layout = (value.shape, value.stride(), value.storage_offset())
    storage = value.untyped_storage()
    for at, each in enumerate(inputs):
        if storage._cdata == each.untyped_storage()._cdata:
            return _Output(view_of=at, layout=layout, dtype=value.dtype)
    exact = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta").untyped_storage()
    return _Output(layout=layout, dtype=value.dtype) if exact.nbytes() == storage.nbytes() and not layout[2] else None
