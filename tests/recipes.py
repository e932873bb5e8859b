"""Material for a tiny run: a Llama with a tokenizer, a corpus with a learnable pattern, and a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.tiny import SHAPE, write_llama


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model/` and `corpus.jsonl`."""
    folder = tmp_path_factory.mktemp("material")
    write_llama(folder / "model", SHAPE, seed=1)
    entries = {"<end>": 0, **{f"w{i}": i for i in range(1, SHAPE.vocab)}}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    draw = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(60):
            first = draw.randrange(1, SHAPE.vocab)
            words = [f"w{1 + (first + 7 * i + draw.randrange(2)) % (SHAPE.vocab - 1)}" for i in range(40)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return folder


def tiny_recipe(material: Path) -> dict[str, Any]:
    """Return a recipe with every stage, of a few steps each."""
    training = {"tokens": 6 * 8 * 16, "global_batch": 8, "micro_batch": 4, "warmup_steps": 2, "lr": 5e-3}
    training |= {"save_every": 2, "validate_every": 3}
    return {
        "model": str(material / "model"),
        "out": "run",
        "dtype": "float32",
        "data": {"sequence": 16, "sources": [{"path": str(material / "corpus.jsonl"), "validation": 0.2}]},
        "correct": training,
        "score": {"samples": 16, "micro_batch": 4},
        "prune": {"hidden": 32, "ffn": 48, "heads": 4, "layers": [0, 1, 3, 4]},
        "distill": training,
        "random_baseline": True,
        "evaluate": {"samples": 16, "micro_batch": 4},
    }


@pytest.fixture
def recipe_file(material: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny recipe with top-level keys replaced (None: removed), and its run folder in
    the same folder."""

    def write(name: str = "recipe.yaml", **changes: Any) -> Path:
        recipe = tiny_recipe(material) | {"out": str(tmp_path / "run")} | changes
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return path

    return write
