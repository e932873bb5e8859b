"""Check at run time, in every process that imports the tests, the tensor shapes and dtypes that annotations state.

jaxtyping compares a tensor with its annotation. Functions are wrapped where they stand, so that the package needs no
checker, and a worker of the pool, which imports the tests with its first job, checks like the process that started it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import wraps
from importlib import import_module
from pkgutil import iter_modules
from types import FunctionType, ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

__all__ = ["ROOMS", "ShapeError", "check_shapes"]

PACKAGE = "minitron_megatron"
ROOMS = ("layout", "parallel", "losses", "data", "score", "prune")


class ShapeError(TypeError):
    """A tensor differs from its annotation."""


def check_shapes() -> None:
    """Wrap every function and method of `ROOMS` whose annotations state a tensor's shape."""
    modules = [module for room in ROOMS for module in _modules(import_module(f"{PACKAGE}.{room}"))]
    wrapped: dict[FunctionType, FunctionType] = {}
    for module in modules:
        for value in [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]:
            if isinstance(value, FunctionType):
                wrapped[value] = checked(value, vars(module))
            elif isinstance(value, type):
                _check_methods(value, vars(module))
    for name, module in list(sys.modules.items()):  # a function has a name in each module that imports it
        if name.partition(".")[0] == PACKAGE:
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in wrapped:
                    setattr(module, key, wrapped[value])


def _modules(room: ModuleType) -> list[ModuleType]:
    return [import_module(f"{room.__name__}.{each.name}") for each in iter_modules(room.__path__)]


def _check_methods(kind: type, names: dict[str, Any]) -> None:
    """Wrap the methods of a class, also those that dataclass and NamedTuple made."""
    for name, method in list(vars(kind).items()):
        if isinstance(method, FunctionType):
            setattr(kind, name, checked(method, names))
        elif isinstance(method, staticmethod):
            setattr(kind, name, staticmethod(checked(method.__func__, names)))


def checked(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Return the function with a check of its arguments and its result; itself if its annotations state no shape."""
    hints = {name: found for name, hint in function.__annotations__.items() if (found := _shaped(hint, names))}
    if not hints:
        return function
    result = hints.pop("return", None)
    parameters = inspect.signature(function).parameters
    variadic = {name for name, each in parameters.items() if each.kind is each.VAR_POSITIONAL}
    positional = [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]
    places = {name: place for place, name in enumerate(positional) if name in hints}
    passed: set[object] = set()

    def check(given: dict[str, object], *out: object) -> None:
        with jaxtyped("context"), torch._C.DisableTorchFunction():  # an axis has the same size in all of them
            for name, value in given.items():
                for each in value if name in variadic else [value]:  # type: ignore[attr-defined]
                    _check(each, hints[name], f"{function.__qualname__}: {name}")
            for value in out:
                _check(value, result, f"{function.__qualname__}: its result")

    def check_once(given: dict[str, object], *out: object) -> None:
        """Check what has other shapes and dtypes than all calls before."""
        with torch._C.DisableTorchFunction():
            key = (tuple(given), _described([*given.values(), *out]), len(out))
        if key not in passed:
            check(given, *out)
            passed.add(key)

    @wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        given: dict[str, Any] = {name: kwargs[name] for name in hints if name in kwargs}
        given |= {name: args[place:] for name, place in places.items() if name in variadic}
        given |= {name: args[place] for name, place in places.items() if name not in variadic and place < len(args)}
        check_once(given)
        out = function(*args, **kwargs)
        if result is not None:
            check_once(given, out)
        return out

    return wrapper  # type: ignore[return-value]


def _described(value: object) -> object:
    """Return all that the check of a value depends on: the dtype and shape of each tensor in it."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    if isinstance(value, Mapping):
        value = list(value.values())
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else type(value)


def _shaped(hint: object, names: dict[str, Any]) -> Any:
    """Return the annotation that a string stands for, if it states the shape of a tensor; otherwise None."""
    text = getattr(hint, "__forward_arg__", hint)  # NamedTuple's are ForwardRefs
    if isinstance(text, str):
        try:
            hint = eval(text, names)
        except NameError:  # a name for type checkers only
            return None
    return hint if _states_shape(hint) else None


def _states_shape(hint: object) -> bool:
    return _is_tensor(hint) or (get_origin(hint) in CONTAINERS and any(map(_states_shape, get_args(hint))))


def _is_tensor(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


CONTAINERS = (Union, UnionType, tuple, list, Sequence, Mapping)


def _check(value: object, hint: Any, where: str) -> None:
    if not _fits(value, hint):
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:200]
        raise ShapeError(f"{where} is {given}, not {getattr(hint, '__name__', hint)}")


def _fits(value: object, hint: Any) -> bool:
    if _is_tensor(hint):
        return isinstance(value, hint)
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(each, parts[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, parts[1]) for each in value.values())
    return hint is not type(None) or value is None
