"""Registries: things of one kind by name. A recipe chooses among them, and a plugin adds its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast

from .errors import RecipeError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> thing, or `module:attribute`, which is imported when it is first asked for."""

    def __init__(self, kind: str, things: Mapping[str, T | str]) -> None:
        """kind: the noun of error messages, such as `divergence`."""
        self.kind, self._things = kind, dict(things)

    def known(self, name: str) -> str:
        """Return `name`. Raises RecipeError with the nearest name if there is no such thing."""
        if name not in self._things:
            raise RecipeError(f"{self.kind} {name!r} is not known.{did_you_mean(name, self)} Known: {', '.join(self)}.")
        return name

    def __getitem__(self, name: str) -> T:
        thing = self._things[self.known(name)]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = self._things[name] = cast(T, getattr(import_module(module), attribute))
        return thing

    def __setitem__(self, name: str, thing: T | str) -> None:
        """Add a thing. Raises RecipeError if the name is taken."""
        if name in self._things:
            raise RecipeError(f"{self.kind} {name!r} exists already. Give yours another name.")
        self._things[name] = thing

    def __delitem__(self, name: str) -> None:
        del self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
