"""Imports go down only: the floors of docs/architecture.md, section 2, and the check that enforces them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from minitron_megatron.recipe.key_names import key_paths

PACKAGE = "minitron_megatron"
ROOT = Path(__file__).parents[1] / PACKAGE

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "events", "numbers", "wrong_values"}),
    frozenset({"files", "gpus", "layout", "registry", "run_folder", "settings"}),
    frozenset({"parallel"}),
    frozenset({"records"}),
    frozenset({"model", "data", "losses"}),
    frozenset({"score", "prune", "refit", "train", "convert"}),
    frozenset({"distill", "search", "evaluate", "serve"}),
    frozenset({"align"}),
    frozenset({"recipe", "report"}),
    frozenset({"forecast"}),
    frozenset({"run"}),
    frozenset({"rehearsal", "studies"}),
    frozenset({"cli"}),
    frozenset({"testing", "__main__"}),  # above everything: no other module imports them
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

OUTSIDE: dict[str, frozenset[str]] = {
    "torch.distributed": frozenset({"parallel", "rehearsal", "testing"}),
    "megatron.core.parallel_state": frozenset({"parallel"}),
    "megatron.bridge": frozenset({"convert"}),
    "megatron": frozenset(
        {"parallel", "model", "data", "losses", "score", "prune", "refit", "train", "distill", "testing"}
    ),
    "transformers": frozenset(
        {"align", "convert", "data", "serve"}
    ),  # align: reward models; data: tokenizers without a tokenizer.json
    "huggingface_hub": frozenset({"convert"}),
    "safetensors": frozenset({"align", "records", "convert", "serve"}),
    "tokenizers": frozenset({"data"}),
    "pyarrow": frozenset({"data"}),
    "datasets": frozenset({"data", "evaluate"}),
    "pydantic": frozenset({"files", "recipe", "settings"}),  # files: JSON is validated against types
    "yaml": frozenset({"recipe", "run"}),
    "typer": frozenset({"cli"}),
    "rich": frozenset({"cli", "report"}),
    "matplotlib": frozenset({"report"}),
    "wandb": frozenset({"report"}),
    "tensorboard": frozenset({"report"}),
    "lm_eval": frozenset({"evaluate"}),
    "rouge_score": frozenset({"evaluate"}),
    "modelopt": frozenset({"serve"}),
    "tensorrt_llm": frozenset({"serve"}),
}
"""Third-party module -> the rooms that may import it. The longest matching name applies; a module without a row may be
imported anywhere."""

LAZY = (
    *("megatron", "transformers", "matplotlib", "wandb", "tensorboard", "lm_eval", "modelopt", "nltk", "rouge_score"),
    *("pyarrow", "datasets", "huggingface_hub"),
)
"""Slow imports: allowed only inside the function that needs them."""

FORBIDDEN = ("transformer_engine", "apex", "triton", "tensorrt_llm")
"""Optional, and possibly broken, packages: likewise allowed only inside functions."""

MOST_LINES_A_FILE, MOST_LINES_A_FUNCTION = 400, 60
MOST_ANY = 8
"""Times that the word Any may stand in 1,000 lines of the package, imports and texts included."""


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """Absolute dotted name; `from a import b` is `a.b`, whether or not b is a module."""
    lazy: bool
    """Whether the import is inside a function, or for type checkers only."""


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Yield every import in a module's source, and every use of `torch.distributed` as an attribute of torch."""
    tree = ast.parse(source)
    here = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{start}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Attribute) and (chain := ast.unparse(node)).startswith("torch.distributed"):
            yield Import(node.lineno, chain, True)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for kid in ast.iter_child_nodes(node):
            yield from walk(kid, inside)

    yield from walk(tree, False)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def climbs(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the imports of a module that are not allowed, with the reason."""
    room = module.split(".")[1]
    for each in imports(source, module, is_package):
        if within(each.name, PACKAGE):
            yield from (f"{module}:{each.line}: {why}" for why in _inside(room, each.name.split(".")[1:]))
        else:
            yield from (f"{module}:{each.line}: {why}" for why in _outside(room, each))


def _inside(room: str, target: list[str]) -> Iterator[str]:
    other = target[0] if target else ""
    if other in ("", room, "__version__"):
        return
    if other not in FLOOR:
        yield f"{other} is on no floor"
    elif FLOOR[other] >= FLOOR[room]:
        yield f"{room} (floor {FLOOR[room]}) may not import {other} (floor {FLOOR[other]})"
    elif len(target) > 1 and target[1:] not in ([name] for name in public(other)):
        yield f"{room} imports {'.'.join(target)}, which is not in {other}'s __all__"


@cache
def public(room: str) -> tuple[str, ...]:
    """Return the `__all__` of a room, or of a single-file module."""
    files = [path for path in (ROOT / room / "__init__.py", ROOT / f"{room}.py") if path.exists()]
    tree = ast.parse("".join(path.read_text() for path in files))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return tuple(ast.literal_eval(lists[0])) if lists else ()


def _outside(room: str, each: Import) -> Iterator[str]:
    row = max((name for name in OUTSIDE if within(each.name, name)), key=len, default=None)
    if row and room not in OUTSIDE[row]:
        yield f"{room} may not import {row}; {', '.join(sorted(OUTSIDE[row]))} may"
    if not each.lazy and any(within(each.name, name) for name in LAZY + FORBIDDEN):
        yield f"{each.name} must be imported inside the function that needs it"


def modules() -> Iterator[tuple[Path, str]]:
    """Yield every file of the package below its root, with its dotted name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts != (PACKAGE, "__init__"):
            yield path, ".".join(part for part in parts if part != "__init__")


def test_every_room_stands_on_one_floor() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path, _ in modules()}
    assert rooms <= set(FLOOR)
    assert len(FLOOR) == sum(map(len, FLOORS))


def test_imports_go_down() -> None:
    found = [why for path, name in modules() for why in climbs(path.read_text(), name, path.name == "__init__.py")]
    assert not found, "\n" + "\n".join(found)


def needs(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return module -> the modules of `sources` that it imports directly, lazily or not."""
    return {
        name: {
            other
            for each in imports(source, name)
            for other in (each.name, each.name.rpartition(".")[0])
            if other in sources and other != name
        }
        for name, source in sources.items()
    }


def test_no_two_modules_need_each_other() -> None:
    TopologicalSorter(needs({name: path.read_text() for path, name in modules() if path.stem != "__init__"})).prepare()


def test_the_check_of_circles_bites() -> None:
    lazy = {"m.r.a": "from .b import x", "m.r.b": "def f():\n    from . import c", "m.r.c": "import m.r.a"}
    with pytest.raises(CycleError):
        TopologicalSorter(needs(lazy)).prepare()


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every string but the help of settings; `{}` stands for each value of an f-string."""
    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    documented = [after for body in bodies for of, after in pairwise(body) if isinstance(of, ast.AnnAssign)]
    help_texts = {each.value for each in documented if isinstance(each, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in help_texts:
            yield node.lineno, node.value


@cache
def asked() -> re.Pattern[str]:
    """Pattern of a command, and of a recipe key in a block: `data.text_key`, `search.{}`."""
    dotted = {key for key in key_paths() if "." in key}
    dotted |= {f"{key.rpartition('.')[0]}.{{}}" for key in dotted}
    return re.compile(rf"`minitron |(?<![\w./])({'|'.join(map(re.escape, dotted))})(?![\w/])")


def recipe_words(source: str) -> list[str]:
    return [f"{line}: {text}" for line, text in texts(source) if asked().search(text)]


def test_rooms_below_the_recipe_name_no_key_and_no_command() -> None:
    """They raise facts; `with_keys_in_errors` adds the key."""
    lower = [each for each in modules() if FLOOR[each[1].split(".")[1]] <= FLOOR["recipe"] and ".recipe" not in each[1]]
    assert not [f"{name}:{found}" for path, name in lower for found in recipe_words(path.read_text())]


@pytest.mark.parametrize(
    "source", ['"Set data.text_key."', 'f"search.{axis} is {size}"', 'f"{x}: run `minitron score`"']
)
def test_the_check_of_words_bites(source: str) -> None:
    assert recipe_words(source)
    assert not recipe_words(f"class A:\n    x: int\n    {source.removeprefix('f')}\n")


def test_importing_the_package_imports_nothing() -> None:
    assert not list(imports((ROOT / "__init__.py").read_text(), PACKAGE, is_package=True))


def test_files_and_functions_stay_small() -> None:
    long = []
    for path, name in modules():
        source = path.read_text()
        if (lines := source.count("\n")) > MOST_LINES_A_FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.FunctionDef)
                and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_A_FUNCTION
            ):
                long.append(f"{name}.{node.name}: {lines} lines")
    assert not long, long


def test_most_values_have_a_type() -> None:
    sources = [(path.read_text(), name) for path, name in modules()]
    words = {name: len(re.findall(r"\bAny\b", source)) for source, name in sources}
    most = sorted(words, key=lambda name: -words[name])[:5]
    share = 1000 * sum(words.values()) / sum(source.count("\n") for source, _ in sources)
    assert share <= MOST_ANY, f"{share:.1f} Any in 1,000 lines; most in {', '.join(most)}"


@pytest.mark.parametrize(
    ("room", "source", "why"),
    [
        ("layout.param", "from ..parallel import Topology", "layout (floor 1) may not import parallel (floor 2)"),
        ("score.run", "from ..prune import trim", "score (floor 5) may not import prune (floor 5)"),
        ("score.run", "from .. import prune", "score (floor 5) may not import prune"),
        ("score.run", "import minitron_megatron.cli", "may not import cli"),
        ("prune.trim", "def f():\n    from minitron_megatron.testing import Pool", "may not import testing"),
        ("errors", "from .layout import Axis", "errors (floor 0) may not import layout"),
        ("prune.trim", "from ..layout.table import lookup", "'s __all__"),
        ("prune.trim", "from ..layout import table", "'s __all__"),
        ("prune.trim", "from ..errors import difflib", "'s __all__"),
        ("prune.trim", "from ..attic import x", "attic is on no floor"),
        (
            "train.loop",
            "def f():\n    import torch\n    torch.distributed.barrier()",
            "train may not import torch.distributed",
        ),
        ("train.loop", "import torch.distributed as dist", "train may not import torch.distributed"),
        (
            "model.build",
            "def f():\n    from megatron.core import parallel_state",
            "may not import megatron.core.parallel_state",
        ),
        ("layout.table", "def f():\n    import megatron.core", "layout may not import megatron"),
        ("model.build", "from megatron.core.models.gpt import GPTModel", "inside the function"),
        ("convert.load", "import transformers", "inside the function"),
        ("model.spec", "import transformer_engine.pytorch", "inside the function"),
        ("train.loop", "def f():\n    from rich import print", "train may not import rich"),
    ],
)
def test_the_check_bites(room: str, source: str, why: str) -> None:
    found = list(climbs(source, f"{PACKAGE}.{room}"))
    assert any(why in each for each in found), found


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("prune.trim", "from ..layout import Keep, lookup\nfrom .plan import choose\nfrom ..errors import PlanError"),
        ("records.plan", "from .. import __version__\nfrom ..errors import PlanError"),
        ("model.build", "def f():\n    from megatron.core.models.gpt.gpt_model import GPTModel"),
        ("model.build", "if TYPE_CHECKING:\n    from megatron.core.models.gpt.gpt_model import GPTModel"),
        (
            "parallel.topology",
            "import torch.distributed as dist\ndef f():\n    from megatron.core import parallel_state",
        ),
        ("cli.main", "import typer\nfrom ..layout import Shape"),
    ],
)
def test_the_check_lets_good_imports_pass(room: str, source: str) -> None:
    assert not list(climbs(source, f"{PACKAGE}.{room}"))
