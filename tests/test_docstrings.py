"""Docstrings are plain: a noun phrase or an imperative sentence, whose subject comes first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("Of", "What", "Whose", "Which", "That", "Where")
FILES = [
    path
    for folder in ("minitron_megatron", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
]


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string that stands alone: of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def unclear(source: str) -> list[int]:
    """Return the lines of docstrings that begin with a word of FORBIDDEN."""
    return [line for line, text in docstrings(source) if text.split() and text.split()[0].rstrip(",") in FORBIDDEN]


def test_no_docstring_begins_with_a_relative_word() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sorted(FILES) for line in unclear(path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text", ['"""Where it lies."""', 'x = 1\n"""Of each layer."""', 'def f():\n    """What is left."""']
)
def test_the_check_finds_them(text: str) -> None:
    assert unclear(text)
