"""Corpora and tokenizer of the quickstart: held-out text is not trained on, no code is lost, files are reproducible."""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from minitron_megatron.data import check_tokenizer
from minitron_megatron.data.tokenizer import end_of_document, load_tokenizer

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
LIBRARY = Path(sysconfig.get_path("stdlib"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = script("corpus")

SOURCE = '''#!/usr/bin/env python
"""About the module."""
# Copyright
# of someone

import os  # for paths


class A:
    """Only words."""


class B(A):
    """One line and
        more."""

    x = "# no comment"

    def f(self):
        "Words" " in parts."
        # why
        return """no docstring"""  # really


def g(): "inline"
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Library of five modules; two are held out and one is skipped."""
    for name in ("a", "json/decoder", "argparse", "jsonish", "a_package/test/b", "config-x/c"):
        path = tmp_path / "lib" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""About {name}."""\nx = {name!r}\n')
    return tmp_path / "lib"


def made(out: Path) -> dict[str, list[dict[str, str]]]:
    return {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in out.iterdir()}


def test_code_and_words_are_separated() -> None:
    code, words = corpus.separate(SOURCE)
    assert code == (
        'import os\n\n\nclass A:\n    pass\n\n\nclass B(A):\n\n    x = "# no comment"\n\n    def f(self):\n'
        '        return """no docstring"""\n\n\ndef g(): pass\n'
    )
    assert words == (
        "About the module.\n\nCopyright\nof someone\n\nOnly words.\n\nOne line and\nmore.\n\n"
        "Words in parts.\n\nwhy\n\ninline\n"
    )


@pytest.mark.parametrize("name", ["ast", "json/decoder", "dataclasses", "asyncio/events", "typing", "textwrap"])
def test_no_code_is_lost_and_no_words_stay(name: str) -> None:
    source = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    assert ast.dump(ast.parse(corpus.separate(source)[0])) == ast.dump(tree)


def test_held_out_modules_are_in_the_validation_files_alone(library: Path, tmp_path: Path) -> None:
    sizes = corpus.write(library, tmp_path / "out")
    documents = made(tmp_path / "out")
    for kind, text in (("code", "x = {name!r}\n"), ("prose", "About {name}.\n")):
        for part, names in (("", ["a", "jsonish"]), (".valid", ["argparse", "json/decoder"])):
            expected = [{"text": text.format(name=name), "module": name} for name in names]
            assert documents[kind + part] == expected
            assert sizes[kind + part] == sum(len(document["text"]) for document in expected)


def test_the_corpora_are_the_same_run_after_run(library: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        corpus.write(library, tmp_path / out)
    assert all(
        (tmp_path / "one" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "two").iterdir()
    )


def test_every_held_out_entry_names_a_module() -> None:
    assert all((LIBRARY / entry).is_dir() or (LIBRARY / f"{entry}.py").is_file() for entry in corpus.HELD_OUT)


def test_the_tokenizer_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = script("tokenizer")
    for kind in tokenizer.FILES:
        text = "def double(x):\n    return 2 * x\n" * 50 if kind == "code" else "Doubles what it is given, twice. " * 50
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer.save(tokenizer.train(tmp_path), tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out")
    text = "def f(x):\n    return 'é'  # Doubles\n"
    assert loaded.decode(loaded.encode(text).ids) == text
    assert end_of_document(tmp_path / "out", loaded) == 0


def test_the_shipped_tokenizer_loads_in_transformers() -> None:
    from transformers import AutoTokenizer

    teacher = FOLDER / "teacher"
    check_tokenizer(teacher, 1536)
    loaded, reference = load_tokenizer(teacher), AutoTokenizer.from_pretrained(teacher)
    text = "class Naïve:\n    def __init__(self):\n        self.x = 1<|endoftext|>\n"
    assert loaded.encode(text, add_special_tokens=False).ids == reference(text)["input_ids"]
    assert reference.decode(reference(text)["input_ids"]) == text
    assert reference.eos_token_id == end_of_document(teacher, loaded) == 0
