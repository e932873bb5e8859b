"""Tokenizer whose ids can be written by hand, and corpora in which each token identifies its document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minitron_megatron.data import prepare

WORDS = 3000


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer: `w7` -> 7; `<end>` (0) ends a document; a post-processor adds `<start>` (3000), never in corpora."""
    entries = {"<end>": 0, **{f"w{i}": i for i in range(1, WORDS)}, "<start>": WORDS}
    made = Tokenizer(models.WordLevel(entries, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", WORDS)])
    made.enable_truncation(2)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


@pytest.fixture(scope="session")
def corpora(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Prefixes of two corpora of 40 documents: document d holds `w1+d` 25 times, or `w1001+d` in the second."""
    folder = tmp_path_factory.mktemp("corpora")

    def make(name: str, first: int) -> str:
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"w{first + d} " * 25}) + "\n" for d in range(40)))
        prepare([source], tokenizer, folder / name, validation=0.2)
        return str(folder / name)

    return make("low", 1), make("high", 1001)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a file of lines and returns its path."""

    def write(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write
