"""Conversations of BFCL, MT-Bench and ChatRAG: prompts as a server makes them, grades, and equal answers at layouts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest

from minitron_megatron.convert import load_hf
from minitron_megatron.data import transformers_tokenizer
from minitron_megatron.errors import DataError, FileError, MinitronError, RecipeError
from minitron_megatron.evaluate import CHAT_TASKS, SUITES, Judge, Task, check_tasks, run_tasks, scores_of
from minitron_megatron.evaluate.chat.bfcl import BFCL
from minitron_megatron.evaluate.chat.chatrag import CHATRAG, NO_ANSWER
from minitron_megatron.evaluate.chat.task import Answered, read_records, the_file
from minitron_megatron.evaluate.harness import HarnessMethods
from minitron_megatron.events import silent
from minitron_megatron.layout import Shape
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.chats import CHATML, LLAMA3, write_tokenizer
from tests.evaluate.chat_files import bfcl, chatrag, mt_bench, write
from tests.evaluate.test_judge import KEY, OK, Stub
from tests.tiny import write_llama

SHAPE = Shape(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=448)
TASKS = (Task("bfcl_v2_live", 0, "accuracy"), Task("mt_bench"), Task("chatrag", 0, "score"))
Found = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama with a chat template, whose answers have at most six tokens."""
    folder = write_llama(tmp_path_factory.mktemp("model"), SHAPE, 3)
    write_tokenizer(folder, CHATML, "<|im_end|>")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 6}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for make in (bfcl, mt_bench, chatrag):
        make(root)
    return root


def answered(topology: Topology, model: Path, files: Path, out: Path, judge: Judge | None, limit: int | None) -> Found:
    """Return scores, results, the prompts that the model got, and warnings."""
    prompts: list[str] = []
    replies = HarnessMethods.replies

    def note(self: HarnessMethods, texts: list[str], kwargs: Any) -> list[str]:
        prompts.extend(texts)
        return replies(self, texts, kwargs)

    with patch.object(HarnessMethods, "replies", note), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run_tasks(
            load_hf(model, topology),
            TASKS,
            transformers_tokenizer(model),
            topology,
            files=files,
            limit=limit,
            judge=judge,
            answers=out / "student",
            seed=5,
        )
    notes = [str(each.message) for each in caught if str(each.message).startswith("mt_bench")]
    return {"scores": scores_of(found, TASKS), "found": found, "prompts": prompts, "notes": notes}


def lines(out: Path) -> dict[str, list[Found]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(out.glob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def plain(pool: Pool, model: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    out = tmp_path_factory.mktemp("plain")
    (found,) = pool.run(answered, model, files, out, None, None)
    (note,) = found.pop("notes")
    assert note == f"mt_bench has no score, for no judge is set. Its answers are in {out / 'student-mt-bench.jsonl'}"
    return found, out


def test_prompts_are_those_of_a_server(plain: tuple[Found, Path], model: Path) -> None:
    """The template writes the functions; the second turn holds the first answer; documents stand before a question."""
    prompts = plain[0]["prompts"]
    assert len(prompts) == 12 + 4 + 12
    assert '"name": "weather_get"' in prompts[0] and '"type": "object"' in prompts[0]
    assert prompts[0].endswith("<|im_start|>user\nRain in Rome?<|im_end|>\n<|im_start|>assistant\n")
    first = lines(plain[1])["student-mt-bench.jsonl"][0]["choices"][0]["turns"][0]
    said = [{"role": "user", "content": "Write 0."}, {"role": "assistant", "content": first}]
    said.append({"role": "user", "content": "Again 0."})
    tokenizer = transformers_tokenizer(model)
    assert tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) in prompts[12:16]
    assert "source: text 4<|im_end|>" in prompts[-1] and "text 5" not in prompts[-1]
    assert prompts[-1].count("Please give a full and complete answer for the question. Who?<|im_end|>") == 1


def test_scores_and_answers_stand_in_files(plain: tuple[Found, Path]) -> None:
    """A random model calls nothing, which is right of the irrelevant questions alone."""
    found, out = plain
    assert found["scores"]["bfcl_v2_live"] == pytest.approx(2 / 12) and found["scores"]["mt_bench"] is None
    assert found["found"]["results"]["bfcl_v2_live"]["live_irrelevance,none"] == 1.0
    assert 0 <= found["scores"]["chatrag"] < 0.5
    written = lines(out)
    assert {name: len(rows) for name, rows in written.items()} == {
        "student-bfcl-v2-live.jsonl": 12,
        "student-chatrag.jsonl": 12,
        "student-mt-bench.jsonl": 2,
    }
    assert len({row["answer"] for row in written["student-chatrag.jsonl"]}) > 1
    assert {len(row["choices"][0]["turns"]) for row in written["student-mt-bench.jsonl"]} == {2}


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_answers_are_those_of_one_rank(
    pool: Pool, model: Path, files: Path, tmp_path: Path, plain: tuple[Found, Path], layout: dict[str, int]
) -> None:
    for rank, found in enumerate(pool.run(answered, model, files, tmp_path, None, None, **layout)):
        assert len(found.pop("notes")) == (rank == 0) and found == plain[0]
    assert lines(tmp_path) == lines(plain[1])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with Stub() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def judged(topology: Topology, *args: Any) -> Found:
    with patch.dict("os.environ", {"JUDGE_KEY": KEY, "no_proxy": "*"}):
        return answered(topology, *args)


def test_the_first_rank_asks_the_judge(pool: Pool, model: Path, files: Path, tmp_path: Path, stub: Stub) -> None:
    """A limit takes questions from each category in turn."""
    for found in pool.run(judged, model, files, tmp_path, stub.judge, 1, dp=2):
        assert found["scores"]["mt_bench"] == 7.0
        assert found["found"]["n-samples"]["bfcl_v2_live"] == {"original": 12, "effective": 1}
        assert len(found["prompts"]) == 1 + 2 + 1
    assert len(stub.requests) == 2
    (line,) = lines(tmp_path)["student-mt-bench.jsonl"]
    assert line["ratings"] == [7.0, 7.0] and line["judgments"] == [OK, OK]
    assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())


def graded(task: Any, folder: Path, answers: dict[str, str]) -> dict[str, float | None]:
    """Grade the first question of some groups. answers: group -> answer."""
    questions = {question.group: question for question in reversed(task.questions(folder))}
    said = [Answered(questions[group], (answer,)) for group, answer in answers.items()]
    return dict(task.grade(said, folder, None, None, silent).metrics)


def test_calls_of_each_category_are_graded(files: Path) -> None:
    right = {
        "live_simple": "[weather.get(city='rome')]",
        "live_multiple": '<tool_call>{"name": "weather_get", "arguments": {"city": "Rome", "share": 0.5}}</tool_call>',
        "live_parallel": "[weather_get(city='Rome'), weather_get(city='Rome')]",
        "live_parallel_multiple": "weather_get(city='Rome', share=0.5), weather_get(city='Rome')",
        "live_irrelevance": "I cannot tell.",
        "live_relevance": "[weather.get()]",
    }
    assert set(graded(BFCL, files / "bfcl_v2_live", right).values()) == {1.0}
    wrong = dict.fromkeys(right, "[weather.get(city='Paris')]") | {"live_relevance": "[]"}
    assert set(graded(BFCL, files / "bfcl_v2_live", wrong).values()) == {0.0}


def test_messages_of_the_user_that_follow_each_other_are_one(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "bfcl_v2_live", tmp_path / "tasks")
    said = [{"role": role, "content": text} for role, text in (("system", "S"), ("user", "a"), ("user", "b"))]
    change(tmp_path / "tasks" / "BFCL_v3_live_simple.json", question=[said])
    first = BFCL.questions(tmp_path / "tasks")[0]
    assert first.turns == (({"role": "system", "content": "S"}, {"role": "user", "content": "a\n\nb"}),)


def test_chatrag_is_graded_as_its_authors_do(files: Path) -> None:
    """The three of DoQA count as one set. A refusal of any form is one form in QuAC and DoQA alone."""
    answers = {
        "coqa": "A Red, fox!",
        "sqa": "red hen",
        "quac": "I'm sorry, but the text doesn't mention it.",
        "inscit": NO_ANSWER,
        "doqa_movies": "fox",
        "doqa_travel": "the red fox",
        "convfinqa": "It rose by 12.3% in all.",
    }
    found = graded(CHATRAG, files / "chatrag", answers)
    assert {name: found[name] for name in answers} == pytest.approx(
        {"coqa": 1, "sqa": 0.5, "quac": 1, "inscit": 0, "doqa_movies": 2 / 3, "doqa_travel": 1, "convfinqa": 1}
    )
    assert found["score"] == pytest.approx((1 + 0.5 + 1 + 0 + (2 / 3 + 1) / 2 + 1) / 6) and found["qrecc"] is None
    for answer, right in (("$0.1 million + 0.02 (2017)", 1), ("0.123", 1), ("0.13", 0), ("", 0)):
        assert graded(CHATRAG, files / "chatrag", {"convfinqa": answer})["convfinqa"] == right


ONE_ANSWER = r"has no examples and one answer a question\. Remove its shots and answers\."


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        (Task("bfcl_v2_live", 3), RecipeError, f"task bfcl_v2_live {ONE_ANSWER}"),
        (Task("mt_bench", answers=2), RecipeError, f"task mt_bench {ONE_ANSWER}"),
        (Task("chatrag", metric="scores"), RecipeError, r"no metric scores\. Did you mean 'score'"),
    ],
)
def test_settings_that_a_task_lacks_are_refused(files: Path, task: Task, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_tasks([task], files)


def test_a_task_without_its_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        check_tasks([Task("mt_bench")], tmp_path)
    assert str(caught.value) == (f"{tmp_path}/mt_bench is not a folder. Put the files of the task mt_bench there.")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.jsonl", "b.jsonl"], "{folder} has both a.jsonl and b.jsonl. Remove one of them."),
        ([], "{folder} has no a.jsonl. Copy it from FastChat."),
    ],
)
def test_the_one_file_of_a_task_is_found(files: list[str], said: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        the_file(tmp_path, "*.jsonl", "a.jsonl", "FastChat")
    assert str(caught.value) == said.format(folder=tmp_path)


def test_a_list_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.json holds no questions\. Write one JSON object per line\.$"):
        read_records(tmp_path / "a.json", dict)


def test_tasks_are_checked_before_they_run(model: Path, files: Path, tmp_path: Path) -> None:
    assert {*CHAT_TASKS} <= {task.name for task in SUITES["instruct"]}
    check_tasks(TASKS, files, tokenizer=model, judge=Judge("http://localhost/v1", "gpt"))
    with pytest.raises(RecipeError, match=r"task bfcl_v2_live reads local files alone\. Set `task_files`"):
        check_tasks(TASKS, None)
    other = shutil.copytree(model, tmp_path / "model")
    (other / "chat_template.jinja").write_text(LLAMA3)
    check_tasks(TASKS[1:], files, tokenizer=other)
    with pytest.raises(RecipeError, match=r"ignores tools, .* task bfcl_v2_live would not reach the model"):
        check_tasks(TASKS, files, tokenizer=other)
    refusal = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    (other / "chat_template.jinja").write_text(refusal)
    with pytest.raises(
        DataError, match=r"chat template fails on a conversation: no system role\. Leave out this task, or"
    ):
        check_tasks([Task("chatrag")], files, tokenizer=other)
    (other / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="task mt_bench needs a chat template"):
        check_tasks([Task("mt_bench")], files, tokenizer=other)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 200}
    (other / "config.json").write_text(json.dumps(config))
    check_tasks([Task("chatrag")], files, tokenizer=model)
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2080}))
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens is longer than the 32 "):
        check_tasks([Task("mt_bench")], files, tokenizer=model, model=other)  # two answers of 1024 tokens
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens is longer than the 136 .* `truncate`"):
        check_tasks([Task("chatrag")], files, tokenizer=model, model=other)


def change(path: Path, **keys: Any) -> None:
    """Change the first record of a file; remove the keys that are None."""
    first, *rest = path.read_text().removeprefix("[").removesuffix("]").splitlines()
    row = json.loads(first) | keys
    write(path, [{key: value for key, value in row.items() if value is not None}, *map(json.loads, rest)])


TWO_TURNS = r"live_simple\.json, question live_simple_0-0-0 has 2 turns, but live questions have one\. Correct it\."


@pytest.mark.parametrize(
    ("task", "file", "keys", "says"),
    [
        ("bfcl_v2_live", "BFCL_v3_live_simple.json", None, "has no file of live_simple, such as"),
        ("bfcl_v2_live", "possible_answer/BFCL_v3_live_multiple.json", None, "has no possible_answer/BFCL_v3_live_mul"),
        ("bfcl_v2_live", "BFCL_v3_live_relevance.json", {"function": None}, "record 1 .* function"),
        (
            "bfcl_v2_live",
            "BFCL_v3_live_simple.json",
            {"id": "x"},
            r"question x has no true calls of its functions\. Correct its",
        ),
        ("bfcl_v2_live", "BFCL_v3_live_simple.json", {"question": [[], []]}, TWO_TURNS),
        (
            "bfcl_v2_live",
            "BFCL_v3_live_simple.json",
            {"function": [{"name": "f", "parameters": {"properties": {"a": {"type": "set"}}}}]},
            "the parameter a of f has no type that BFCL compares",
        ),
        ("bfcl_v2_live", "BFCL_v3_live_simple.json", {"question": [[{"role": "user"}]]}, r"record 1 .*content"),
        (
            "bfcl_v2_live",
            "BFCL_v3_live_simple.json",
            {"function": [{"name": "f", "parameters": {"properties": {"a": 3}}}]},
            r"question live_simple_0-0-0, f .*properties\.a",
        ),
        ("mt_bench", "question.jsonl", {"turns": "one"}, "record 1 .* turns"),
        ("chatrag", "coqa/dev.json", None, r"has no coqa/dev\.json"),
        (
            "chatrag",
            "coqa/dev.json",
            {"messages": [{"role": "assistant", "content": "Ann."}]},
            r"coqa/dev\.json, record 1 does not end with a question of the user\. Correct its messages\.",
        ),
    ],
)
def test_files_that_are_missing_or_wrong_are_named(
    files: Path, tmp_path: Path, task: str, file: str, keys: dict[str, Any] | None, says: str
) -> None:
    shutil.copytree(files / task, tmp_path / task)
    if keys is None:
        (tmp_path / task / file).unlink()
    else:
        change(tmp_path / task / file, **keys)
    with pytest.raises((DataError, FileError), match=says) as found:
        check_tasks([Task(task)], tmp_path)
    assert isinstance(found.value, MinitronError)


def ifeval(topology: Topology, model: Path, files: Path, sentences: Path) -> float | None:
    import nltk

    with patch.object(nltk.data, "path", [str(sentences)]):
        found = run_tasks(
            load_hf(model, topology), (TASK_IFEVAL,), transformers_tokenizer(model), topology, files=files, chat=True
        )
    return scores_of(found, (TASK_IFEVAL,))["ifeval"]


TASK_IFEVAL = next(task for task in SUITES["instruct"] if task.name == "ifeval")


def test_ifeval_is_the_mean_of_four_without_a_network(pool: Pool, model: Path, tmp_path: Path) -> None:
    """Two of three prompts and three of four instructions can be followed by any answer, strictly and loosely."""
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        write(tmp_path / "tokenizers" / "punkt_tab" / "english" / name, [])
    sentences = ["length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}]
    word = ["keywords:forbidden_words", {"forbidden_words": ["zyzzyva"]}]
    bullets = ["detectable_format:number_bullet_lists", {"num_bullets": 4}]
    rows = []
    for at, asked in enumerate([[sentences], [word], [word, bullets]]):
        names, options = zip(*asked, strict=True)
        rows.append({"key": at, "prompt": "Write.", "instruction_id_list": names, "kwargs": options})
    write(tmp_path / "ifeval" / "train.jsonl", rows)
    assert pool.run(ifeval, model, tmp_path, tmp_path) == [pytest.approx((2 / 3 + 3 / 4) / 2)]
