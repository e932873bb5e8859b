"""Every command and every block of the guide runs, in the order of its pages, on a tiny model and a recipe for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from minitron_megatron.align import PreferenceObjective
from minitron_megatron.forecast import estimate
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import read_metrics
from tests.formats import CHAT_TEMPLATE, cache_of_the_hub, every_format, model_of_the_hub
from tests.guide import ROOT, commands, run_command
from tests.recipes import tiny_recipe

GUIDE = ROOT / "docs" / "guide"
PAGES = list(dict.fromkeys(re.findall(r"\]\(([\w-]+)\.md\)", (GUIDE / "README.md").read_text())))
"""In the order in which the guide first names them, each once."""
WITHOUT_COMMANDS = ("footguns", "metrics", "coming-from")
BENCH = {"ladder": [[4, 4]], "batches": [1], "requests": 2}
BUDGET = {"tokens": 4 * 8 * 16, "micro_batch": 2, "save_every": 2, "validate_every": 2}


@pytest.fixture(scope="module")
def folder(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a reader: a recipe, its corpus and the run of it."""
    here = tmp_path_factory.mktemp("reader")
    recipe = tiny_recipe(material) | {"out": "runs/own", "random_baseline": False, "bench": BENCH}
    recipe["correct"] = recipe["correct"] | BUDGET
    recipe["distill"] = recipe["distill"] | BUDGET | {"retain": True}
    recipe["model"] = str(shutil.copytree(material / "model", here / "model"))
    (here / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (here / "corpus.jsonl").symlink_to(material / "corpus.jsonl")
    every_format(here, texts(material))
    write_prompts(here)
    block = re.search(r"```yaml\n(out: runs/family.*?)```", (GUIDE / "shapes.md").read_text(), re.S)
    assert block
    (here / "family.yaml").write_text(yaml.safe_dump({**recipe, "prune": {}, **yaml.safe_load(block[1])}))
    done = run_command("minitron run recipe.yaml", here, {})
    assert done.returncode == 0, done.stderr
    return here


def write_prompts(folder: Path) -> None:
    """Write the records and the plugin of the page on preference pairs."""
    prompts = [{"prompt": f"w{number} w7", "characters": 9 * number} for number in range(1, 6)]
    rated = {"prompt": "w1", "responses": ["w2", "w3"], "rewards": [0.9, 0.2]}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "rated.jsonl").write_text(json.dumps(rated))
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (GUIDE / "pairs.md").read_text(), re.S):
        (folder / name).write_text(code)


def test_every_page_is_in_the_order_and_every_link_leads_somewhere() -> None:
    assert set(PAGES) == {page.stem for page in GUIDE.glob("*.md")} - {"README"}
    for page in GUIDE.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (GUIDE / link).exists(), (page.name, link)


def test_every_logged_number_is_explained(folder: Path) -> None:
    known = set(re.findall(r"`([^`]+)`", (GUIDE / "metrics.md").read_text()))
    logged = {name for line in read_metrics(folder / "runs" / "own" / "metrics.jsonl") for name in line}
    logged |= {"pairs", "pairs_per_second", "reward_gap", *PreferenceObjective._names}
    assert len(logged) > 20
    for name in logged:
        assert name in known or name.split("/")[0] + "/" in {each.split("/")[0] + "/" for each in known}, name


def texts(material: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (material / "corpus.jsonl").read_text().splitlines()]


def test_prose_is_wrapped_at_110_columns() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 12
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for line in text.splitlines():
            prose = not re.match(r"    | *[|#<]", line)
            assert not prose or len(line) <= 110, (page.name, line)


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_run(
    page: str, folder: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, models = cache_of_the_hub(tmp_path / "hub", texts(material)), model_of_the_hub(tmp_path, material / "model")
    for name, value in (data | models).items():
        monkeypatch.setenv(name, value)
    places = {"path/to/llama": material / "model", "> recipe.yaml": "> started.yaml", "runs/quickstart": "runs/own"}
    lines = [line for line in commands(GUIDE / f"{page}.md") if not line.startswith("make")]
    assert bool(lines) == (page not in WITHOUT_COMMANDS)
    for line in lines:
        done = run_command(line, folder, {named: Path(place) for named, place in places.items()})
        assert done.returncode == 0, (line, done.stdout, done.stderr)


@pytest.mark.parametrize("page", PAGES)
def test_its_blocks_are_parts_of_a_recipe(page: str, folder: Path) -> None:
    """Each block of a page replaces its part of the recipe that the reader has."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", (GUIDE / f"{page}.md").read_text(), re.S)):
        path = folder / f"{page}-{number}.yaml"
        part = yaml.safe_load(block)
        own = {key: value for key, value in recipe.items() if key != "prune" or not part.keys() & {"search", "student"}}
        path.write_text(yaml.safe_dump(own | part))
        found = load_recipe(path)
        assert "search" not in part or len(estimate(found).candidates) > 4
