"""Messages about wrong values of a recipe: the key, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import MinitronError, RecipeError
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe, read_yaml
from minitron_megatron.search import Limit
from minitron_megatron.train import OBJECTIVES, Training

Write = Callable[..., Path]
SEARCH = {"budget": {"params": 10**6}, "light": {"tokens": 128}}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model is 3: give a path."),
    ({"model": ""}, "model is '': give a path; this one is empty or contains a NUL character"),
    (
        {"score": {"samples": True}},
        "samples is true: give a value of another type; this key is not a true/false",
    ),
    (
        {"distill": {"tokens": 1, "lr": 1e39}},
        "lr is 1e+39: give 0, or a number between 1.2e-38 and 3.4e38 in size",
    ),
    (
        {"search": SEARCH | {"ffn": {"from": 9, "to": 3, "step": 1}}},
        "range needs from <= to and a step of at least 1",
    ),
    ({"search": SEARCH | {"ffn": [48], "multiples": {"fnn": 2}}}, "multiples has the unknown axis 'fnn'. Did you mean"),
    (
        {"search": {"ffn": [48], "budget": {"params": [1, 2, 3]}}},
        "search.budget.params is [1, 2, 3]: give one number (the limit), or a pair [minimum, maximum]",
    ),
    (
        {"search": SEARCH | {"ffn": [48], "serving": {"gpu": "H100", "table": "bench.json"}}},
        "Speed comes from gpu or from table, not from both: remove one",
    ),
    (
        {"data": {"sequence": 16, "sources": [{"path": "a.jsonl", "validation": 1.5}]}},
        "validation is 1.5: give a path of held-out files, or the share of documents to hold out, between 0",
    ),
    (
        {"data": {"sequence": 16, "sources": [{"path": "a.jsonl", "loss_on": "all"}]}},
        "loss_on is for chats: set format to chat, or remove loss_on",
    ),
    (
        {"search": SEARCH | {"ffn": {"from": 1, "to": 10_001, "step": 1}}},
        "Give a range of at most 10,000 sizes: set a larger step, or a lower to",
    ),
    (
        {"search": SEARCH | {"budget": {}, "ffn": [48]}},
        "search: A search needs a budget: set budget.params or another key of budget",
    ),
    (
        {"prune": {"hidden": 32, "refit": "outputs", "merge": "q"}},
        "A refit aims at the unmerged heads and would undo prune.merge: set one to none",
    ),
    (
        {"correct": {"continuous": True}, "distill": {"objective": "cross_entropy"}},
        "correct.continuous trains the teacher during distillation, but distill.objective is cross_entropy: remove one",
    ),
    (
        {"distill": {"teacher_window": 4, "states": {"outputs": ["1:1"], "alpha": "dynamic"}}},
        "states.alpha: dynamic needs the teacher's states of a whole step: set alpha to a number, or remove "
        "teacher_window",
    ),
    ({"align": [{"method": "dpo"}]}, "Give `pairs`, or `sample` to make them, and not both"),
    (
        {"evaluate": {"judge": {"url": "https://me:secret@host/v1", "model": "judge"}}},
        "Give url without user, password, query and fragment; key_env names the variable of a key",
    ),
    (
        {"evaluate": {"judge": {"url": "https://host/v1", "model": "judge", "key_env": "sk-123"}}},
        "Give the name of an environment variable as key_env, such as OPENAI_API_KEY, not the key",
    ),
]


@pytest.mark.parametrize(("changes", "said"), CASES, ids=[said[:24] for _, said in CASES])
def test_a_wrong_value_of_a_key(recipe_file: Write, changes: dict[str, Any], said: str) -> None:
    path = recipe_file(**({"prune": None} if "search" in changes else {}), **changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = " ".join(str(caught.value).split())
    assert text.startswith(f"recipe {path}: ") and said in text and "secret" not in text and "sk-123" not in text


def test_a_continuous_correction_has_the_objective_of_language_models(recipe_file: Write) -> None:
    OBJECTIVES["another"] = "tests.recipe:another"
    try:
        with pytest.raises(RecipeError, match=r"continuous trains the teacher by cross-entropy: remove correct.object"):
            load_recipe(recipe_file(correct={"continuous": True, "objective": "another"}))
    finally:
        del OBJECTIVES["another"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "it is not YAML: "),
        ('a: "x\\0y"', "a holds a NUL character. Remove it."),
        ("a: {b: [1, .inf]}", "a.b.1 is inf. Give a finite number."),
        (
            'a: "\\ud83d"',
            "a holds half of a surrogate pair, which no file can hold. Write the whole character.",
        ),
        ("a: {1: 2}", "a has the key 1, which is not text. Put it in quotes."),
        ("[" * 1000, "it is nested too deeply. Write it flatter."),
        ("[" * 300 + "]" * 300, "levels, with aliases expanded. Make it smaller."),
    ],
)
def test_text_that_is_no_tree(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a", " is not a mapping of keys. Start from `minitron init MODEL`."),
        (b"\xff", " is not UTF-8 at byte 0. Save the file as UTF-8."),
        (bytes(10 * 2**20 + 1), ": it is larger than 10 MiB. Give a recipe, which is a small YAML file."),
    ],
    ids=["a list", "no UTF-8", "large"],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"recipe {path}{said}"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2 but no RANK. Unset it, or use launch/local.sh."),
        (
            {"WORLD_SIZE": "2", "RANK": "5"},
            "WORLD_SIZE='2', MASTER_ADDR='', MASTER_PORT=''. Use launch/local.sh or torchrun.",
        ),
        ({"WORLD_SIZE": "two"}, "the environment has WORLD_SIZE='two', not a whole number. Correct or unset it."),
    ],
)
def test_an_environment_that_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MinitronError) as caught:
        Topology.start()
    assert said in str(caught.value)


def test_numbers_that_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match=r"which no value satisfies\. Give \[at least, at most\]\."):
        Limit(3.0, 2.0)
    with pytest.raises(RecipeError, match=r"min_lr is 1, above lr, 0\.1\. Set it to 0\.1 or less"):
        Training(steps=1, lr=0.1, min_lr=1.0)
