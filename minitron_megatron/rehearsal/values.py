"""Numbers of fake tensors that are known, since they come from the host: masks, labels, indices, counters.

They are kept beside their tensors and carried along by every operation all of whose inputs are known. No number of a
model is known, but all are taken to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from .operations import Args, Kwargs

__all__ = ["LIKE", "Values", "mutated"]

MOST = 2**20
"""Numbers of a tensor up to which values are carried along."""
ANGLES = {"cos", "sin"}
"""Operations of rotary embeddings, which each layer runs on many known numbers and no control flow depends on."""
CONSTANTS = {"zeros", "ones", "full", "arange", "scalar_tensor", "eye"}
LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""Operations whose result depends on the shape of their input alone."""
OVERWRITE = ("copy_", "fill_", "zero_")

aten = torch.ops.aten


def mutated(func: OpOverload, args: Args, kwargs: Kwargs) -> list[FakeTensor]:
    """Return the fake tensors that an operation writes to."""
    found: list[object] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return [each for each in found if isinstance(each, FakeTensor)]


class Values:
    """Known values by fake tensor. Storages that were written with unknown numbers have none."""

    def __init__(self) -> None:
        self._unknown: set[int] = set()

    def of(self, tensor: object) -> Tensor | None:
        """Return a tensor's values on the host; None: unknown."""
        if not isinstance(tensor, FakeTensor):
            return tensor if isinstance(tensor, Tensor) and tensor.device.type == "cpu" else None
        found = getattr(tensor, "known_values", None)
        return None if found is None or tensor.untyped_storage()._cdata in self._unknown else found

    def some_unknown(self, tensors: Sequence[FakeTensor]) -> bool:
        """Return whether a number of one of them is not known."""
        return any("known_values" not in each.__dict__ or self.of(each) is None for each in tensors)

    def set(self, tensor: FakeTensor, values: Tensor) -> None:
        """Record a tensor's values."""
        vars(tensor)["known_values"] = values

    def forget(self, tensor: FakeTensor) -> None:
        """Make the values of a tensor's storage unknown."""
        if tensor.untyped_storage().nbytes() <= 8 * MOST:
            self._unknown.add(tensor.untyped_storage()._cdata)

    def renew(self, tensor: FakeTensor) -> None:
        """Forget what was known of another storage with the same address."""
        self._unknown.discard(tensor.untyped_storage()._cdata)

    def carry(self, func: OpOverload, args: Args, kwargs: Kwargs, out: object) -> None:
        """Run an operation on the known values of its inputs, for those of its outputs."""
        results = [each for each in tree_leaves(out) if isinstance(each, FakeTensor)]
        written = mutated(func, args, kwargs)
        if not results and not written:
            return
        if self._is_assumed(func, args, results):
            return
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        values = self._on_host(func, args, kwargs, inputs, results)
        if values is None:
            for each in written:
                self.forget(each)
            return
        for fake, value in zip(results, values, strict=False):
            if fake.shape == value.shape:
                self.set(fake, value)
        if func._schema.name.endswith(OVERWRITE):
            for each in written:
                if each.numel() * each.element_size() == each.untyped_storage().nbytes():
                    self.renew(each)

    def _is_assumed(self, func: OpOverload, args: Args, results: Sequence[FakeTensor]) -> bool:
        """Set the results that follow from two assumptions: numbers are finite, and routers are balanced."""
        if func is aten.topk.default and self.of(args[0]) is None:
            chosen, experts = args[1], args[0].shape[-1]
            rows = results[1].numel() // chosen
            turns = (torch.arange(rows)[:, None] * chosen + torch.arange(chosen)) % experts
            self.set(results[1], turns.reshape(results[1].shape))
            return True
        is_itself = func is aten.eq.Tensor and args[0] is args[1]
        is_finite = func is aten.ne.Scalar and math.isinf(args[1])
        if (is_itself or is_finite) and self.of(args[0]) is None and results[0].numel() <= MOST:
            self.set(results[0], torch.ones(results[0].shape, dtype=torch.bool))
            return True
        return False

    def _on_host(
        self, func: OpOverload, args: Args, kwargs: Kwargs, inputs: list[Tensor], results: Sequence[FakeTensor]
    ) -> list[Tensor] | None:
        """Return the outputs of an operation on known values; None where one is unknown or too large."""
        name = func._schema.name.split("::")[1]
        known = {id(each): self.of(each) for each in inputs}
        complete = name in LIKE or all(each is not None for each in known.values())
        random = torch.Tag.nondeterministic_seeded in func.tags
        large = any(each.numel() > MOST for each in (results if name in LIKE else (*results, *inputs)))
        if func.namespace != "aten" or name in ANGLES or not complete or random or large:
            return None
        if not inputs and name not in CONSTANTS:
            return None

        def host(x: object) -> object:
            if isinstance(x, Tensor):
                found = known[id(x)]
                return torch.empty(x.shape, dtype=x.dtype) if found is None else found
            return torch.device("cpu") if isinstance(x, torch.device) else x

        with torch.utils._python_dispatch._disable_current_modes():
            try:
                return list(_tensors(func(*tree_map(host, args), **tree_map(host, kwargs))))
            except (RuntimeError, NotImplementedError):  # the host has no kernel for it
                return None


def _tensors(values: object) -> Iterator[Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))
