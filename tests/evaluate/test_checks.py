"""Errors in a task's shots, metrics, files and templates are reported by one message before anything runs."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import DataError, MinitronError, RecipeError
from minitron_megatron.evaluate import Task, check_tasks
from minitron_megatron.evaluate.messages import quiet, warn
from minitron_megatron.evaluate.shots import check_shots
from minitron_megatron.evaluate.tasks import _configured, _leaves, _registered
from tests.evaluate.test_tasks import model, write_lines

__all__ = ["model"]

ARC = [
    {"question": f"What is {i}?", "choices": {"text": ["so", f"n{i}"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
    for i in range(6)
]
MMLU = [{"question": f"Is {i} odd?", "choices": ["no", "yes", "both", "none"], "answer": i % 2} for i in range(6)]
GSM = [{"question": f"How many is {i}?", "answer": f"so #### {i}"} for i in range(8)]
WINO = [{"sentence": f"The {i} _ broke.", "option1": "cup", "option2": "it", "answer": "1"} for i in range(8)]
TRIVIA = [{"question": f"Who is {i}?", "answer": {"aliases": ["a"], "value": "a"}} for i in range(8)]
SWAG = [
    {"ctx_a": f"A {i}", "ctx_b": "b", "ctx": f"A {i} b", "activity_label": "x", "endings": list("abcd"), "label": "1"}
    for i in range(8)
]


def written(root: Path, **splits: list[dict[str, Any]]) -> Path:
    """Write files named task__split; return their folder."""
    for name, rows in splits.items():
        task, _, split = name.rpartition("__")
        write_lines(root / task / f"{split}.jsonl", rows)
    return root


@pytest.mark.parametrize(
    ("splits", "task", "message"),
    [
        ({"arc_challenge__test": ARC}, Task("arc_challenge", 3), r"arc_challenge/train\.jsonl is missing"),
        (
            {"arc_easy__test": ARC, "arc_easy__validation": ARC},
            Task("arc_easy", 1),
            r"train\.jsonl is missing.*Add it, or set sh",
        ),
        ({"arc_easy__train": ARC}, Task("arc_easy", 0), r"arc_easy/test\.jsonl is missing: task arc_easy is scored"),
        ({"mmlu_anatomy__test": MMLU}, Task("mmlu_anatomy", 3), r"mmlu_anatomy/dev\.jsonl is missing"),
        ({"gsm8k__test": GSM}, Task("gsm8k", 3), r"gsm8k/train\.jsonl is missing"),
        ({"gsm8k__test": GSM}, Task("gsm8k"), r"gsm8k/train\.jsonl is missing"),
        ({"winogrande__validation": WINO}, Task("winogrande", 2), r"winogrande/train\.jsonl is missing"),
        ({"hellaswag__validation": SWAG}, Task("hellaswag", 2), r"hellaswag/train\.jsonl is missing"),
        ({"triviaqa__validation": TRIVIA}, Task("triviaqa", 1), r"triviaqa/train\.jsonl is missing"),
        (
            {"winogrande__train": WINO[:2], "winogrande__validation": WINO[2:]},
            Task("winogrande", 2),
            r"train\.jsonl holds 2 examples, but task winogrande needs 3 with 2 shots\. Add more, or use fewer shots\.",
        ),
        (
            {"gsm8k__train": GSM[:2], "gsm8k__test": GSM[2:]},
            Task("gsm8k", 3),
            r"holds 2 examples, but task gsm8k needs 3 with 3 shots\. Add more",
        ),
        ({"gsm8k__train": GSM, "gsm8k__test": GSM}, Task("gsm8k", 3), r"holds all scored questions of test\.jsonl"),
        ({"gsm8k__train": GSM, "gsm8k__test": GSM[:3]}, Task("gsm8k", 3), r"holds all scored questions of test\.jsonl"),
        (
            {"lambada_openai__test": [{"text": "a b c"}]},
            Task("lambada_openai", 2),
            r"no examples besides the scored questions",
        ),
        ({"gsm8k_cot__test": GSM}, Task("gsm8k_cot", 9), r"gsm8k_cot has 8 examples, fewer than its shots \(9\)"),
    ],
)
def test_examples_never_come_from_the_scored_split(
    tmp_path: Path, splits: dict[str, list[dict[str, Any]]], task: Task, message: str
) -> None:
    with pytest.raises(MinitronError, match=message):
        check_tasks([task], written(tmp_path, **splits))


def test_examples_that_are_there_are_fine(tmp_path: Path, model: Path) -> None:
    files = written(
        tmp_path,
        gsm8k_cot__test=GSM,
        gsm8k__test=GSM[:4],
        gsm8k__train=GSM[4:],
        arc_easy__test=ARC,
        mmlu_anatomy__test=MMLU[:3],
        mmlu_anatomy__dev=MMLU[3:],
        wikitext__test=[{"page": "some words"}],
    )
    tasks = [Task("gsm8k_cot", 2), Task("gsm8k", 3), Task("arc_easy", 0), Task("mmlu_anatomy", 3), Task("wikitext", 3)]
    check_tasks(tasks, files, tokenizer=model, truncate=True)
    assert _configured(tasks[-1], "wikitext", files)["num_fewshot"] == 0, "a page has no prompt to put examples into"


SHOWS_THE_ANSWERS = (
    "task t has no examples besides the scored questions, so examples would show the answers. Set its shots to 0."
)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"test_split": "test", "fewshot_split": "test"}, ""),  # the harness leaves out the question itself
        ({"test_split": "test", "fewshot_split": "dev"}, ""),
        ({"test_split": "test", "fewshot_config": {"split": "dev"}, "fewshot_split": "test"}, ""),
        ({"validation_split": "val", "training_split": "train"}, ""),
        ({"test_split": "test", "validation_split": "val"}, ""),
        ({"test_split": "test", "fewshot_config": {"samples": [1, 2]}}, ""),
        ({"validation_split": "val", "fewshot_split": "val"}, SHOWS_THE_ANSWERS),
        ({"validation_split": "val", "fewshot_config": {"split": "val"}}, SHOWS_THE_ANSWERS),
        ({"validation_split": "val"}, SHOWS_THE_ANSWERS),
        ({"test_split": "test"}, SHOWS_THE_ANSWERS),
        (
            {"test_split": "test", "fewshot_config": {"samples": [1]}},
            "task t has 1 example, fewer than its shots (2). Use fewer shots.",
        ),
        ({"training_split": "train"}, "task t names no split to score. Leave it out."),
    ],
)
def test_where_examples_come_from(config: dict[str, Any], said: str) -> None:
    if not said:
        check_shots("t", config | {"num_fewshot": 2})
    else:
        with pytest.raises(RecipeError) as caught:
            check_shots("t", config | {"num_fewshot": 2})
        assert str(caught.value) == said


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("lambada_openai", 0, "accuracy"), r"lambada_openai has no metric accuracy\. Did you mean 'acc'\? It has"),
        (Task("arc_easy", 0, "acc_nrom"), r"no metric acc_nrom\. Did you mean 'acc_norm'"),
        (Task("gsm8k", 0, "exact_match,strict"), r"no filter strict .* Did you mean 'strict-match'"),
        (Task("gsm8k", 0, "acc,strict-match"), r"no metric acc\. .*exact_match"),
        (Task("ifeval", 0, ("prompt_level_strict_acc", "nothing")), r"ifeval has no metric nothing"),
        (Task("xlsum_english", 0, "rouge"), r"no metric rouge\. Did you mean 'rouge_l'"),
        (Task("humaneval", 0, "pass@1"), r"no metric pass@1\. Did you mean 'pass_at_1'"),
        (Task("glue", 0), r"tasks of glue have different first metrics"),
        (Task("glue", 0, "acc"), r"task cola has no metric acc"),
        (Task("arc_easi", 0), r"^there is no task arc_easi\. Did you mean 'arc_easy'\? Correct its name, or leave"),
        (Task("t0_eval", 0), r"t0_eval defines a task of its own, .*, which is not supported\. Name other tasks\."),
    ],
)
def test_an_unknown_metric_or_task_is_known_before(task: Task, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_tasks([task], None, run_code=True)


def test_a_task_that_the_harness_cannot_load_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("lm_eval.tasks._yaml_loader.load_yaml", fails)
    with pytest.raises(RecipeError) as caught:
        _registered("arc_easy", False)
    assert str(caught.value) == "task arc_easy cannot be loaded by the harness: no network. Leave it out."


def test_known_metrics_are_fine_and_groups_keep_what_they_say() -> None:
    check_tasks([Task("gsm8k", 0, "exact_match,flexible-extract"), Task("arc_easy", 0, "acc_norm,none")], None)
    check_tasks([Task("mmlu_stem", 5, "acc")], None)
    assert _leaves("openllm")["hellaswag"] == {"fewshot_split": "train", "num_fewshot": 10}
    with pytest.raises(
        RecipeError, match=r"^task mmlu_anatomy is listed twice, but results hold each task once\. Remove one\."
    ):
        check_tasks([Task("mmlu_anatomy", 0), Task("mmlu_stem", 5, "acc")], None)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"\n \n", r"test\.jsonl holds no questions\. Write one JSON object per line\."),
    "latin": (
        b'{"question": "a"}\n{"question": "\xe9"}',
        r"test\.jsonl, line 2 is not UTF-8\. Save the file as UTF-8\.",
    ),
    "torn": (b'{"question": "a"', r"line 1 is not JSON"),
    "list": (b"[1]", r"test\.jsonl, line 1 is not a JSON object with the fields of a question\. Correct it\."),
    "null": (b"null", r"line 1 is not a JSON object"),
    "nan": (b'{"question": NaN, "answer": "x"}', r"line 1 is not JSON: question is nan"),
    "deep": (b'{"question": ' + b"[" * 100_000, r"line 1 is nested too deeply"),
    "digits": (b'{"question": ' + b"1" * 5000 + b"}", r"line 1 is not JSON"),
    "big": (b'{"question": "a", "answer": 99999999999999999999999}', r"question 1: the field answer is 9999"),
    "half": (b'{"question": "a \\ud800", "answer": "1"}', r"question 1: the field question"),
    "kinds": (
        json.dumps(GSM[0]).encode() + b'\n{"question": 3, "answer": "x"}',
        r"question 2: the field question is 3",
    ),
    "missing": (json.dumps(GSM[0]).encode() + b'\n{"answer": "x #### 1"}', r"question 2: question is missing or null"),
    "none": (
        json.dumps(GSM[0]).encode() + b'\n\n{"question": null, "answer": "x"}',
        r"question 2: question is missing",
    ),
    "foreign": (b'{"text": "a"}', r"task gsm8k cannot be built from its data.*question 1\): UndefinedError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_message_with_its_place(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        check_tasks([Task("gsm8k", 0)], tmp_path)


def test_fields_that_no_prompt_needs_may_be_missing(tmp_path: Path) -> None:
    rows = [{**row, "note": "x"} for row in GSM[:2]] + [{**GSM[2], "note": None}, GSM[3]]
    check_tasks([Task("gsm8k", 0)], written(tmp_path, gsm8k__test=rows))
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GSM[0]).encode() + b"\r\n")
    check_tasks([Task("gsm8k", 0)], tmp_path)


def test_a_function_of_a_task_that_fails_names_the_task(tmp_path: Path) -> None:
    rows = [{**SWAG[0], "ctx_b": None}]
    with pytest.raises(DataError, match="task hellaswag cannot be built from its data"):
        check_tasks([Task("hellaswag", 0)], written(tmp_path, hellaswag__validation=rows))
    with pytest.raises(RecipeError, match="task squadv2 is Python code in the harness"):
        check_tasks([Task("squadv2", 0)], tmp_path)


def tokenizer_with(model: Path, folder: Path, template: str | None, **config: Any) -> Path:
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template is not None else {}))
    )
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize("template", [None, "{% for m in", "{{ raise_exception('no') }}", "{{ messages[0].x.y }}"])
def test_chat_needs_a_template_that_works(model: Path, tmp_path: Path, template: str | None) -> None:
    folder = tokenizer_with(model, tmp_path, template)
    said = (
        rf"^`chat` needs a chat template, but the tokenizer in {folder} has no working one: .+\. Leave out "
        rf"`chat`, or put a template into chat_template\.jinja there\.$"
    )
    with pytest.raises(MinitronError, match=said):
        check_tasks([Task("gsm8k", 0)], None, tokenizer=folder, chat=True)


def test_prompts_and_settings_have_to_fit_the_model(model: Path, tmp_path: Path) -> None:
    """Checked without a download: generation settings; with files: the first prompt."""
    (tmp_path / "small").mkdir()
    small = tokenizer_with(model, tmp_path / "small", None, max_position_embeddings=200)
    with pytest.raises(DataError, match="the model's context leaves no room for prompts"):
        check_tasks([Task("gsm8k", 0)], None, tokenizer=model, model=small)
    check_tasks([Task("arc_easy", 0)], None, tokenizer=small)
    files = written(tmp_path, arc_easy__test=ARC, arc_easy__train=[{**row, "question": "x" * 90} for row in ARC])
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens is longer than the \d+ .*`truncate`"):
        check_tasks([Task("arc_easy", 3)], files, tokenizer=small)
    check_tasks([Task("arc_easy", 3)], files, tokenizer=small, truncate=True)
    (small / "generation_config.json").write_text('{"num_beams": 3}')
    with pytest.raises(DataError, match="sets num_beams to 3"):
        check_tasks([Task("triviaqa", 0)], None, tokenizer=model, model=small)
    (small / "generation_config.json").write_text("[]")
    with pytest.raises(MinitronError, match=r"generation_config\.json"):
        check_tasks([Task("triviaqa", 0)], None, tokenizer=small)


def test_the_harness_warnings_reach_the_user_once() -> None:
    log = logging.getLogger("lm_eval.api.task")
    with quiet() as messages:
        for number in range(3):
            log.warning("Label index was not in within range\n%s", number)
            log.warning("[Task: t%s] metric acc is defined, but aggregation is not.", number)
        log.info("nothing")
        warnings.warn("of a library", stacklevel=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(messages)
    shown = [str(each.message) for each in caught]
    assert shown == [
        "lm-eval: Label index was not in within range (3 times)",
        "lm-eval: [Task: t0] metric acc is defined, but aggregation is not. (3 times)",
        "lm-eval: of a library",
    ]
