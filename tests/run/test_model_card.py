"""A model card shows names from recipes and paths literally, whatever they mean in Markdown, HTML or YAML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from minitron_megatron.files import write_json
from minitron_megatron.layout import Shape
from minitron_megatron.run.model_card import write_card
from tests.tiny import write_llama

SHAPE = Shape(layers=1, hidden=16, ffn=16, heads=2, kv_groups=2, head_dim=8, vocab=32)
NAMES = [
    "plain-name_of.a Model_7B",
    "a`b``c```d",
    "<script>alert(1)<", 
    "a|b\\|c",
    "![x](http:evil) [y]: z",
    "*bold* _it_ __u__ ~~s~~ $x$",
    "line\nbreak\n---\n\n# heading\n```\n<b>",
    "---",
    "- item: {a: [b, *c]} # no comment",
    "nel\u0085ls\u2028bidi\u202ebell\x07",
    "&lt;b&gt; &amp; https:evil",
    "true",
]  # fmt: skip


class Told(SimpleNamespace):
    """Stand-in for a recipe, with the parts that a card reads."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"evaluate": {"tasks": {self.hostile: 3}}, "note": [self.hostile], "after": {"key": 1}}


def card_of(folder: Path, name: str) -> str:
    model = write_llama(folder / name, SHAPE, 1)
    row = {"model": "teacher", "parameters": 5, "loss_nats_per_token": 1.0, "perplexity": 2.7, "tasks": {name: 0.5}}
    write_json(folder / "summary.json", [row])
    done = {"prepare": {"sources": {name: {"tokens": 7, "weight": 1.0}}}, "distill": {"tokens": 9}}
    distill = SimpleNamespace(has_teacher=True)
    models = {"model": model, "models": {"model": model}, "student": None, "tokenizer": None}
    recipe = Told(**models, out=folder / "out", hostile=name, distill=distill, align=())
    topology, folders = SimpleNamespace(rank=0), SimpleNamespace(summary=folder / "summary.json")
    write_card(SimpleNamespace(recipe=recipe, done=done, topology=topology, folders=folders), model)  # type: ignore[arg-type]
    return (model / "README.md").read_text(encoding="utf-8")


def shown(name: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def inside(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or []]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_a_hostile_name_and_obeys_none_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    card = card_of(tmp_path / "run", name)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": name, "library_name": "transformers", "tags": ["minitron", "pruned", "distilled"],
    }  # fmt: skip
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    assert {token.type for token in inside(tokens)} <= {"text", "text_special"}
    assert not {"html_block", "blockquote_open", "hr"} & {token.type for token in tokens}
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 5 and headings[1:] == ["Training", "Evaluation", "Licence", "Recipe and versions"]
    told = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    assert told[0] == f"run: {shown(name)} pruned and distilled"
    assert told.count(shown(name)) == 2  # the source and the task, in one cell each
    [code] = [token for token in tokens if token.type == "fence"]
    assert yaml.safe_load(code.content) == Told(hostile=name).model_dump()
    rows = [len(line.replace("\\|", "").strip("|").split("|")) for line in body.splitlines() if line.startswith("| ")]
    assert set(rows) == {2, 3, 5}
