"""How far is a recipe's way from the command line to the first trim?

    python benchmarks/recipe_way.py RECIPE      # into a new run folder

A stop is a call from one file of the package into another that passes the recipe on, by itself or inside of a
context; each pair of functions counts once, and the recipe's own methods do not. A return is a stop in a file where
the recipe has been before.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType

way: dict[tuple[str, ...], str] = {}
"""Caller and called function, each with its file -> the file of the called one."""


class Arrived(Exception):
    """The teacher is about to be trimmed."""


def is_recipe(value: object) -> bool:
    return type(value).__name__ == "Recipe"


def place(frame: FrameType | None) -> tuple[str, str]:
    """Return (file, function) of a call inside of the package; ("", "") of any other."""
    name = frame.f_code.co_name if frame else "<"
    file = frame.f_code.co_filename.rpartition("minitron_megatron/")[2] if frame else ""
    inside = frame is not None and "minitron_megatron/" in frame.f_code.co_filename
    return (file, name) if inside and not name.startswith("<") else ("", "")


def listen(frame: FrameType, event: str, _: object) -> None:
    here, back = place(frame), frame.f_back
    if event != "call" or not here[0]:
        return
    if here == ("prune/trim.py", "trim"):
        raise Arrived
    while back is not None and not place(back)[0]:
        back = back.f_back
    names = inspect.getargvalues(frame).args
    values = [frame.f_locals.get(name) for name in names]
    own = bool(values) and names[0] == "self" and is_recipe(values[0])
    carried = any(is_recipe(value) or is_recipe(getattr(value, "recipe", None)) for value in values)
    if back is not None and place(back)[0] != here[0] and carried and not own:
        way.setdefault((*place(back), *here), here[0])


def main(recipe: str) -> None:
    from minitron_megatron.cli.app import app

    sys.setprofile(listen)
    try:
        app(["run", recipe], standalone_mode=False)
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    print("\n".join(f"{file}:{name}" for *_, file, name in way))
    print(f"{len(way)} stops, {len(way) - len({*way.values()})} returns, {len({*way.values()})} files")


if __name__ == "__main__":
    main(sys.argv[1])
