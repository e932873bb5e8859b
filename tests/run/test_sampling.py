"""The newest student of a run answers, or the model that is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.align import AnswerSettings, PairsSummary
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import sample_pairs
from minitron_megatron.testing import Pool
from tests.align.test_sampling import REWARDS
from tests.formats import CHAT_TEMPLATE
from tests.tiny import SHAPES, write_llama

ROUND = {"method": "dpo", "pairs": "later.jsonl"}


def sampled(topology: Topology, recipe: Path, to: Path, model: Path | None = None, **keys: Any) -> PairsSummary:
    settings = AnswerSettings(**{"prompts": to.with_name("prompts.jsonl"), "reward": "letters", "max_tokens": 8} | keys)
    return sample_pairs(load_recipe(recipe), topology, settings, to, model=model)


def column(topology: Topology, recipe: Path, to: Path, model: Path) -> PairsSummary:
    settings = AnswerSettings(prompts=to.with_name("prompts.jsonl"), reward="column")
    return sample_pairs(load_recipe(recipe), topology, settings, to, model=model)


def test_the_newest_student_answers(
    pool: Pool, recipe_file: Callable[..., Path], material: Path, tmp_path: Path
) -> None:
    assert "letters" in REWARDS
    recipe, run = recipe_file(align=[ROUND, ROUND]), tmp_path / "run"
    rows = [{"prompt": f"w{number}", "letters": "12345"} for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=r"there is no model .*distilled\. Run `minitron distill` first"):
        pool.run(sampled, recipe, tmp_path / "0.jsonl")
    for name, seed in (("distilled", 1), ("aligned-1", 2)):
        shutil.copytree(material / "model", run / name)
        write_llama(run / name, SHAPES["untied"], seed)
        (run / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    pool.run(sampled, recipe, tmp_path / "0.jsonl", dp=2)
    assert {path.name for path in tmp_path.glob("0.*")} == {"0.jsonl"}, "what was kept on the way is gone"
    for number, name in enumerate(("distilled", "aligned-1"), 1):
        pool.run(sampled, recipe, tmp_path / f"{number}.jsonl", run / name)
    newest, distilled, aligned = ((tmp_path / f"{number}.jsonl").read_bytes() for number in range(3))
    assert newest == aligned != distilled
    with pytest.raises(RecipeError, match=r"0\.jsonl exists already\. Remove it, or give another file"):
        pool.run(sampled, recipe, tmp_path / "0.jsonl")
    with pytest.raises(
        RecipeError, match=r"the records hold the responses, so that no model answers\. Remove the model\."
    ):
        pool.run(column, recipe, tmp_path / "3.jsonl", run / "distilled")
