"""A tokenizer that is missing, names no end of a document, or does not fit the model is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_megatron.data import check_tokenizer
from minitron_megatron.data.tokenizer import end_of_document, load_tokenizer
from minitron_megatron.errors import DataError


@pytest.fixture
def copy(tokenizer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer, tmp_path / "copy"))


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_vocabulary_must_hold_every_id(tokenizer: Path) -> None:
    check_tokenizer(tokenizer, 3001)
    check_tokenizer(tokenizer, 3072)
    with pytest.raises(DataError, match="has 3001 entries and does not match the model's vocabulary of 3000"):
        check_tokenizer(tokenizer, 3000)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "w3"}, "config": {"eos_token_id": 4}}, 3),
        ({"tokenizer_config": {"eos_token": {"content": "w3"}}}, 3),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 4}}, 5),
        ({"tokenizer_config": {"eos_token": "unknown"}, "config": {"eos_token_id": 0}}, 0),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": 9999}, "config": {"eos_token_id": 4}}, 4),
    ],
)
def test_the_end_of_a_document_is_found(files: dict[str, object], expected: int, copy: Path) -> None:
    write(copy, **files)
    assert end_of_document(copy, load_tokenizer(copy)) == expected


def test_no_end_of_a_document_is_refused(copy: Path) -> None:
    write(copy, tokenizer_config={"eos_token": None}, config={"eos_token_id": None})
    with pytest.raises(DataError, match="names no token that ends a document"):
        end_of_document(copy, load_tokenizer(copy))


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_a_folder_that_only_transformers_can_load(tokenizer: Path, assets: Path, tmp_path: Path) -> None:
    for file in (assets / "tokenizers" / "gpt2").iterdir():
        shutil.copy(file, tmp_path)
    write(tmp_path, config={"model_type": "gpt2"})
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("def f(x):\n    return x").ids) == "def f(x):\n    return x"
    check_tokenizer(tmp_path, 50257)
