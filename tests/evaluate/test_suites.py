"""The papers' suites on local files: programs run only if requested, summaries are compared, samples are equal at every
layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from minitron_megatron.convert import load_hf
from minitron_megatron.data import transformers_tokenizer
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.evaluate import PROGRAMS, SUITES, Task, check_tasks, run_tasks, scores_of, tasks
from minitron_megatron.evaluate.extra_tasks import EXTRA_TASKS
from minitron_megatron.evaluate.programs import isolation, passes, share_that_pass
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.testing import Pool
from tests.evaluate.test_tasks import model, write_lines

__all__ = ["model"]

ADD = "def add(a, b):\n"
CHECK = "def check(f):\n    pass"
TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0"


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("    return a + b", True),
        ("    return a * b", False),
        ("    return a +", False),
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    while True: pass", False),
        ("    return [0] * 10**12", False),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(body: str, right: bool) -> None:
    assert passes(f"{ADD}{body}\n{TESTS}", seconds=3) is right


def test_what_a_program_starts_ends_with_it() -> None:
    child = (
        "import os, subprocess, time; subprocess.Popen(['sleep', '3']); open('ran', 'w'); assert os.path.exists('ran')"
    )
    assert passes(child)
    assert not passes(f"{child}; time.sleep(60)", seconds=2)


def test_pass_at_1_is_the_share_that_pass() -> None:
    programs = [ADD + body for body in ("    return a + b", "    return b + a", "    return 0", "    retrun")]
    assert share_that_pass(programs, TESTS) == 0.5


def test_the_program_of_an_answer() -> None:
    doc = {"prompt": "def f():\n"}
    assert PROGRAMS["humaneval"](doc, "    return 1") == "def f():\n    return 1"
    assert PROGRAMS["humaneval_instruct"](doc, "    return 1\n```\nThis returns") == "def f():\n    return 1\n"
    assert PROGRAMS["mbpp_instruct"](doc, "def f(): pass\n```") == "def f(): pass\n"
    assert PROGRAMS["mbpp_instruct"](doc, "\n```python\ndef f(): pass\n```") == "\ndef f(): pass\n"


def test_summaries_are_compared_by_their_longest_common_subsequence() -> None:
    (metric,) = (each["metric"] for each in EXTRA_TASKS["xlsum_english"]["metric_list"])
    assert metric(["the cat sat on a mat"], ["the cat was on a mat"]) == pytest.approx(5 / 6)
    assert metric(["cats sitting"], ["cat sit"]) == 1.0 and metric(["cat"], ["dog"]) == 0.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suites")
    stories = [{"text": f"It rained {i} days.", "summary": f"rain of {i}", "title": "", "id": str(i)} for i in range(5)]
    write_lines(root / "xlsum_english" / "test.jsonl", stories[:3])
    write_lines(root / "xlsum_english" / "validation.jsonl", stories[3:])
    code = [{"prompt": f"x{i} = 1\n#", "test": CHECK, "entry_point": f"x{i}"} for i in range(3)]
    write_lines(root / "humaneval" / "test.jsonl", code)
    write_lines(root / "humaneval_instruct" / "test.jsonl", code)
    questions = [{"text": "add", "test_list": ["assert 1"] * 3, "code": "x"} for _ in range(2)]
    write_lines(root / "mbpp" / "test.jsonl", questions)
    write_lines(root / "mbpp_instruct" / "test.jsonl", questions)
    return root


TASKS = (
    Task("xlsum_english", 1, "rouge_l"),
    Task("humaneval", 0, "pass_at_1", answers=3, temperature=0.2, top_p=0.95),
    Task("mbpp", 0, "pass_at_1", temperature=0.2, top_p=0.95),
    Task("humaneval_instruct", 0, "pass_at_1"),
    Task("mbpp_instruct", 0, "pass_at_1"),
)


def answers(topology: Topology, folder: Path, files: Path, chat: str = "") -> tuple[dict[str, Any], dict[str, float]]:
    """Return (task -> prompts and answers of each question, scores)."""
    tokenizer, registered = transformers_tokenizer(folder), tasks._registered

    def short(name: str, functions: bool) -> dict[str, Any]:
        config = registered(name, functions)
        return config | {"generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": 12}}

    tokenizer.chat_template = chat or None
    brief = {**EXTRA_TASKS["xlsum_english"]["generation_kwargs"], "max_gen_toks": 12}
    summary = {"xlsum_english": {**EXTRA_TASKS["xlsum_english"], "generation_kwargs": brief}}
    with patch.object(tasks, "_registered", short), patch.object(tasks, "EXTRA_TASKS", summary):
        found = run_tasks(
            load_hf(folder, topology), TASKS, tokenizer, topology, files=files, truncate=True, chat=bool(chat), seed=5
        )
    assert found["programs"] == isolation().description
    questions = {
        name: [(item["arguments"], item["resps"], item["filtered_resps"]) for item in items]
        for name, items in found["samples"].items()
    }
    return questions, scores_of(found, TASKS)


@pytest.fixture(scope="module")
def plain(pool: Pool, model: Path, files: Path) -> tuple[dict[str, Any], dict[str, float]]:
    (found,) = pool.run(answers, model, files)
    return found


def test_programs_and_summaries_have_scores(plain: tuple[dict[str, Any], dict[str, float]]) -> None:
    """HumanEval prompts here end in a comment, so that a random model's answer passes if it stays on that line."""
    questions, scores = plain
    assert [len(item[1][0]) for item in questions["humaneval"]] == [3, 3, 3]
    assert all(len(set(item[1][0])) > 1 for item in questions["humaneval"]), "three answers, sampled independently"
    right = [share_that_pass(item[2][0], f"{CHECK}\ncheck(x{i})") for i, item in enumerate(questions["humaneval"])]
    assert scores["humaneval"] == pytest.approx(sum(right) / 3) and sum(right) > 0
    assert scores.keys() == {task.name for task in TASKS} and all(0 <= value <= 1 for value in scores.values())


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_answers_and_scores_are_those_of_one_rank(
    pool: Pool, model: Path, files: Path, plain: tuple[dict[str, Any], dict[str, float]], layout: dict[str, int]
) -> None:
    for found in pool.run(answers, model, files, **layout):
        assert json.dumps(found) == json.dumps(plain)


def test_prompts_go_through_the_chat_template(pool: Pool, model: Path, files: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    questions, _ = pool.run(answers, model, files, template)[0]
    prompts = [item[0][0][0] for item in questions["xlsum_english"]]
    assert all(prompt.startswith("<user>") and prompt.endswith("<assistant>") for prompt in prompts)


def test_no_program_runs_unless_the_recipe_says_so(recipe_file: Any, files: Path) -> None:
    recipe = load_recipe(recipe_file(evaluate={"suite": "base", "samples": 4}))
    assert {task.name for task in SUITES["base"]} - {task.name for task in recipe.evaluate.wanted()} == {
        "humaneval",
        "mbpp",
    }
    allowed = load_recipe(recipe_file(evaluate={"suite": "base", "samples": 4, "run_code": True}))
    assert allowed.evaluate.wanted() == list(SUITES["base"])
    with pytest.raises(
        RecipeError, match=r"task humaneval runs programs that a model wrote, .*\. Set `run_code` if this is accept"
    ):
        check_tasks([Task("humaneval", 0)], files)
    check_tasks([Task("humaneval", 0)], files, run_code=True)
    with pytest.raises(RecipeError, match=r"task mbpp with examples \(shots: 3\) is not supported"):
        check_tasks([Task("mbpp", 3)], files, run_code=True)


def test_every_task_of_the_suites_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing file is named by its task; a missing package by its name."""
    for task in [*SUITES["base"], *SUITES["instruct"]]:
        if task.name != "ifeval":
            with pytest.raises(DataError, match=rf"{task.name}.* (has no \.jsonl file|is not a folder)"):
                check_tasks([task], tmp_path, run_code=True)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        RecipeError, match=r"^task ifeval needs a package that is not installed: .*langdetect.*lm-eval\[ifeval"
    ):
        check_tasks([Task("ifeval", 0)], tmp_path)


def test_sentences_that_cannot_be_counted_are_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "train.jsonl").write_text("{}")
    said = (
        r"^task ifeval needs NLTK's punkt_tab, which was not found and could not be downloaded\. "
        r"Set NLTK_DATA to a folder that has tokenizers/punkt_tab\.$"
    )
    with pytest.raises(DataError, match=said):
        check_tasks([Task("ifeval", 0)], tmp_path)
