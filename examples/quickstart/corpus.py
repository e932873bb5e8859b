"""Make the quickstart's two corpora from the source of the running Python's standard library, without a download.

    python examples/quickstart/corpus.py OUT

writes `code.jsonl` (the modules without docstrings and comments) and `prose.jsonl` (their docstrings and comment
blocks), one module per document, and the same for the held-out modules as `code.valid.jsonl` and `prose.valid.jsonl`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

HELD_OUT = (
    "argparse",
    "asyncio/locks",
    "asyncio/queues",
    "bdb",
    "calendar",
    "configparser",
    "csv",
    "fractions",
    "http/cookies",
    "json",
    "logging/handlers",
    "shutil",
    "statistics",
    "textwrap",
)
"""Modules and packages of the `valid` files: about 5 % of the text."""

SKIPPED = re.compile(
    r"test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|config-.*|_sysconfigdata.*"
)
"""Folders and files that are missing on some machines, are tables rather than code, or are specific to a machine."""

SourceRange = tuple[tuple[int, int], tuple[int, int]]
"""Start and end in a source, each (line, column); lines from 1, columns in characters."""

GONE = "\0"
"""Marks a line to remove; no source has a null character."""


def modules(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of every module under `root`, sorted by name: `asyncio/queues` for `asyncio/queues.py`."""
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(files):
        if not any(SKIPPED.fullmatch(part) for part in name.split("/")):
            with tokenize.open(files[name]) as stream:
                yield name, stream.read()


def held_out(name: str) -> bool:
    return any(name == entry or name.startswith(f"{entry}/") for entry in HELD_OUT)


def docstrings(source: str) -> dict[int, tuple[str, bool]]:
    """Return first line of each docstring -> (its text, whether the body has nothing else)."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                found[node.body[0].lineno] = text, len(node.body) == 1 and not isinstance(node, ast.Module)
    return found


def separate(source: str) -> tuple[str, str]:
    """Split a module into its code, and its prose: docstrings and whole-line comments, in order."""
    docs, cuts, words = docstrings(source), list[tuple[SourceRange, str]](), list[str]()
    previous_comment, in_docstring = 0, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            cuts.append(((token.start, token.end), ""))
            if token.line.lstrip().startswith("#") and not token.string.startswith(("#!", "# -*-")):
                gap = "" if line == previous_comment + 1 else "\n"
                words.append(gap + token.string.lstrip("#").removeprefix(" "))
                previous_comment = line
        elif token.type == tokenize.STRING and line in docs:
            text, alone = docs.pop(line)
            cuts.append(((token.start, token.end), "pass" if alone else ""))
            words.append("\n" + inspect.cleandoc(text))
            in_docstring = True
        elif token.type == tokenize.STRING and in_docstring:  # "written " "in parts"
            cuts.append(((token.start, token.end), ""))
        elif token.type == tokenize.NEWLINE:
            in_docstring = False
    return without(source, cuts), "\n".join(words).strip() + "\n"


def without(source: str, cuts: list[tuple[SourceRange, str]]) -> str:
    """Return `source` with each range replaced; lines that become empty are removed, and at most two blank lines in a
    row remain."""
    lines = source.split("\n")
    for ((first, start), (last, end)), instead in reversed(cuts):
        kept = (lines[first - 1][:start] + instead + lines[last - 1][end:]).rstrip()
        lines[first - 1 : last] = [kept or GONE] + [GONE] * (last - first)
    text = "\n".join(line for line in lines if line != GONE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def write(root: Path, out: Path) -> dict[str, int]:
    """Write the four files from the library at `root`; return the bytes of text in each."""
    return write_separated(modules(root), out, held_out)


def write_separated(
    sources: Iterable[tuple[str, str]], out: Path, held_out: Callable[[str], bool] = held_out
) -> dict[str, int]:
    """Write the four files from pairs (name, source) of modules; return the bytes of text in each."""
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[tuple[str, str]]] = {
        f"{kind}{part}": [] for kind in ("code", "prose") for part in ("", ".valid")
    }
    for name, source in sources:
        part = ".valid" if held_out(name) else ""
        for kind, text in zip(("code", "prose"), separate(source), strict=True):
            if text.strip():
                texts[kind + part].append((name, text))
    for file, documents in texts.items():
        lines = (json.dumps({"text": text, "module": name}) + "\n" for name, text in documents)
        (out / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {file: sum(len(text.encode()) for _, text in documents) for file, documents in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the quickstart's corpora from Python's standard library.")
    parser.add_argument("out", type=Path, help="the folder to write to")
    for file, size in write(Path(sysconfig.get_path("stdlib")), parser.parse_args().out).items():
        print(f"{file}.jsonl: {size:,} bytes of text")


if __name__ == "__main__":
    main()
