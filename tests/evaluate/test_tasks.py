"""The harness gives equal results for a model at any layout and for its own Hugging Face model of the same weights."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minitron_megatron.convert import load_hf
from minitron_megatron.data import transformers_tokenizer
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.evaluate import Predictor, Sampling, Task, check_tasks, run_tasks, scores_of
from minitron_megatron.evaluate.decoding import decoding
from minitron_megatron.evaluate.harness import HarnessMethods
from minitron_megatron.evaluate.messages import quiet
from minitron_megatron.evaluate.registry import loader
from minitron_megatron.evaluate.tasks import _configured
from minitron_megatron.layout import Shape
from minitron_megatron.model import forward_only
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.tiny import LAYOUTS, write_llama

CONTEXT = 400
SHAPE = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=257)
TASKS = (
    Task("winogrande", 1, "acc"),
    Task("lambada_openai", None, "acc"),
    Task("arc_easy", None, "acc_norm"),
    Task("mmlu_anatomy", 1, "acc"),
    Task("wikitext", None, "word_perplexity"),
    Task("triviaqa", 0, "exact_match"),
)
ASSETS = os.environ.get("MINITRON_TEST_ASSETS")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random byte-level Llama."""
    folder = write_llama(tmp_path_factory.mktemp("model"), SHAPE, 3)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{byte: i for i, byte in enumerate(alphabet, 1)}}, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a few questions of each task, with the fields of its real data."""
    root, many = tmp_path_factory.mktemp("tasks"), range(7)
    sentences = [
        {"sentence": f"The {i} cup hit the bowl so _ broke.", "option1": "the cup", "option2": "it", "answer": "1"}
        for i in many
    ]
    write_lines(root / "winogrande" / "validation.jsonl", sentences[:5])
    write_lines(root / "winogrande" / "train.jsonl", sentences[5:])
    write_lines(root / "lambada_openai" / "test.jsonl", ({"text": f"one {i} two three"} for i in many))
    labels = list("ABC")
    questions = [
        {
            "question": f"What is {i}?",
            "choices": {"text": ["so", "a much longer one", str(i)], "label": labels},
            "answerKey": labels[i % 3],
        }
        for i in many
    ]
    write_lines(root / "arc_easy" / "test.jsonl", questions)
    choices = [{"question": f"Is {i} odd?", "choices": ["no", "yes", "both", "none"], "answer": i % 2} for i in many]
    write_lines(root / "mmlu_anatomy" / "test.jsonl", choices[:5])
    write_lines(root / "mmlu_anatomy" / "dev.jsonl", choices[5:])
    write_lines(root / "wikitext" / "test.jsonl", [{"page": "some words of a page " * 30}, {"page": "short"}])
    questions = [{"question": f"Who is {i}?", "answer": {"aliases": ["a", "b"], "value": "a"}} for i in range(3)]
    write_lines(root / "triviaqa" / "validation.jsonl", questions)
    return root


def megatron(
    topology: Topology, model: Path, files: Path, tasks: tuple[Task, ...], truncate: bool = False, chat: bool = False
) -> dict[str, Any]:
    found = run_tasks(
        load_hf(model, topology),
        tasks,
        transformers_tokenizer(model),
        topology,
        files=files,
        truncate=truncate,
        chat=chat,
        micro_batch=3,
    )
    return {"samples": found["samples"], "scores": scores_of(found, tasks)}


def reference(model: Path, files: Path, tasks: tuple[Task, ...], chat: bool = False) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet(), patch("lm_eval.evaluator.add_env_info"):  # which asks pip and the compilers for their versions
        lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
        configured = [_configured(task, task.name, files) for task in tasks]
        found = simple_evaluate(
            lm, tasks=configured, task_manager=loader(), bootstrap_iters=0, log_samples=True, apply_chat_template=chat
        )
    return {"samples": json.loads(json.dumps(found["samples"], default=str)), "scores": scores_of(found, tasks)}


def expect_alike(found: dict[str, Any], truth: dict[str, Any]) -> int:
    """Compare item by item: log-likelihoods to 1e-4, whether they are greedy, and generated answers."""
    compared = 0
    for name, items in truth["samples"].items():
        by_question = {item["doc_id"]: item for item in found["samples"][name]}
        assert len(by_question) == len(items)
        for item in items:
            for a, b in zip(by_question[item["doc_id"]]["resps"], item["resps"], strict=True):
                a, b = (each[0] for each in (a, b))
                if isinstance(b, list):
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4) and str(a[1]) == str(b[1])
                elif isinstance(b, str) and name == "triviaqa":
                    assert a == b
                else:
                    assert float(a) == pytest.approx(float(b), rel=1e-5)
                compared += 1
    assert found["scores"] == pytest.approx(truth["scores"], rel=1e-4)
    return compared


@pytest.fixture(scope="module")
def truth(model: Path, files: Path) -> dict[str, Any]:
    return reference(model, files, TASKS)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vp2", "dp2"])  # test_equal.py compares one process
def test_every_item_is_that_of_the_harness_own_model(
    pool: Pool, model: Path, files: Path, truth: dict[str, Any], layout: str
) -> None:
    for found in pool.run(megatron, model, files, TASKS, **LAYOUTS[layout]):
        assert expect_alike(found, truth) > 60


TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not (loop.last and continue_final_message) %}<end>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_three_shots_and_chat(pool: Pool, model: Path, tmp_path: Path, chat: bool) -> None:
    """Prompts are equal too, also truncated ones. This template refuses MMLU's description as a system message."""
    folder, files = tmp_path / "model", tmp_path / "files"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *range(60, 90)]}))
    questions = [{"question": f"Who is {i}?", "answer": {"aliases": ["a", "b"], "value": "a"}} for i in range(9)]
    choices = [
        {"question": f"Is {i} odd?", "choices": ["no", "yes", "both", "none"], "answer": i % 2} for i in range(9)
    ]
    for name, rows, scored, shots in (
        ("triviaqa", questions, "validation", "train"),
        ("mmlu_anatomy", choices, "test", "dev"),
    ):
        write_lines(files / name / f"{scored}.jsonl", rows[:3])
        write_lines(files / name / f"{shots}.jsonl", rows[3:])
    tasks = (Task("triviaqa", 3, "exact_match"), Task("mmlu_anatomy", 3, "acc"))
    check_tasks(tasks, files, tokenizer=folder, chat=chat, truncate=True)
    found, truth = pool.run(megatron, folder, files, tasks, True, chat)[0], reference(folder, files, tasks, chat)
    assert expect_alike(found, truth) == 15
    for name, items in truth["samples"].items():
        assert [item["arguments"] for item in found["samples"][name]] == [item["arguments"] for item in items]
        assert ("<user>" in items[0]["arguments"][0][0]) is chat


GREEDY, DRAWN, ONE_CANDIDATE = (0.0, 1.0), (0.8, 0.95), (1.0, 1e-6)
"""(temperature, top_p)."""


def sampled(
    topology: Topology, model: Path, hows: Sequence[tuple[float, float]], kept: bool = True
) -> list[list[list[int]]]:
    """Return the answers to a few prompts, for each way of sampling.

    kept: use the KV cache; else every token reads the whole text again.
    """
    loaded = load_hf(model, topology)
    predictor = Predictor(loaded, topology, micro_batch=2, run=None if kept else partial(forward_only, loaded))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14] * 9, [15] * 4, [16], [17] * 7]
    stop = lambda made: len(made) == 6 or made[-1] % 9 == 0  # noqa: E731
    samplings = [Sampling(temperature, top_p=top_p, seed=4) for temperature, top_p in hows]
    return [predictor.continuations(prompts, 12, stop=stop, sampling=each) for each in samplings]


def test_an_option_that_generate_does_not_know_is_named() -> None:
    with pytest.raises(DataError) as caught:
        decoding({}, {"nonsense": 1}, "model")
    assert str(caught.value) == (
        "generation_kwargs of a task hold nonsense, which transformers' `generate` does not know. Leave the task out."
    )


def test_a_prompt_that_is_no_text_is_named() -> None:
    with pytest.raises(DataError, match=r"^a prompt or an answer is 3, not a string\. Correct the task's data\.$"):
        HarnessMethods._encoded(None, 3, None)  # type: ignore[arg-type]


def test_what_is_generated_depends_on_the_seed_and_not_on_the_layout(pool: Pool, model: Path) -> None:
    """The KV cache changes no sample. Sampling from a single candidate is greedy."""
    greedy, drawn = pool.run(sampled, model, (GREEDY, DRAWN), False)[0]
    assert greedy != drawn and max(map(len, greedy)) == 6 and len({len(made) for made in greedy}) > 1
    for layout in ("tp2-sp", "pp2-vp2", "dp2"):
        for found in pool.run(sampled, model, (GREEDY, DRAWN, ONE_CANDIDATE), **LAYOUTS[layout]):
            assert found == [greedy, drawn, greedy], layout


@pytest.mark.parametrize(
    "wrong", [{"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": float("nan")}, {"top_k": -1}]
)
def test_sampling_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))} is"):
        Sampling(**{"temperature": 1.0, **wrong})  # type: ignore[arg-type]


def answered(topology: Topology, model: Path) -> tuple[list[float], list[list[int]]]:
    pairs = [([5] * n, [6, 7]) for n in (3, 9, 20, 1)] + [([5] * 3, [6, 8])]
    predictor = Predictor(load_hf(model, topology), topology, micro_batch=1)
    return [value for value, _ in predictor.likelihoods(pairs)], predictor.continuations([p for p, _ in pairs[:3]], 4)


def test_experts_answer_alike_at_every_layout(pool: Pool, tmp_path: Path) -> None:
    """Ranks that share experts may have prompts of different lengths."""
    from tests.convert.conftest import make_folder

    folder = make_folder(tmp_path / "mixture", "mixtral")
    plain = pool.run(answered, folder)[0]
    for layout in ({"ep": 2, "dp": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}):
        for values, made in pool.run(answered, folder, **layout):
            assert values == pytest.approx(plain[0], abs=1e-4) and made == plain[1]


def test_what_cannot_be_run_is_one_message(pool: Pool, model: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no task winogrand\. Did you mean 'winogrande'\? Correct its name, or"):
        check_tasks([Task("winogrand")], None)
    with pytest.raises(
        DataError, match=r"/hellaswag has no \.jsonl file\. Add one for each split, such as test\.jsonl\."
    ):
        check_tasks([Task("hellaswag")], files)
    write_lines(tmp_path / "lambada_openai" / "test.jsonl", [{"text": "a b " * 200 + "end"}])
    long = (Task("lambada_openai"),)
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens is longer than the \d+ .* `truncate`"):
        pool.run(megatron, model, tmp_path, long, tp=2)
    assert pool.run(megatron, model, tmp_path, long, True)[0]["scores"].keys() == {"lambada_openai"}


def assets(root: Path) -> tuple[Task, ...]:
    """Write real items of four tasks for the real model; return the tasks."""
    bench = Path(str(ASSETS)) / "bench"

    def lines(path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (bench / path).read_text().splitlines()]

    every = lines("winogrande/dev.jsonl")
    write_lines(root / "winogrande" / "validation.jsonl", every[:60])
    write_lines(root / "winogrande" / "train.jsonl", every[60:90])
    write_lines(root / "lambada_openai" / "test.jsonl", lines("lambada/lambada_test.jsonl")[:40])
    for split in ("dev", "test"):
        with (bench / "mmlu" / f"anatomy_{split}.csv").open() as file:
            rows = [dict(row) for row in csv.DictReader(file)][:40]
        anatomy = (
            {"question": r["question"], "choices": [r[f"choice{i}"] for i in range(4)], "answer": int(r["answer"])}
            for r in rows
        )
        write_lines(root / "mmlu_anatomy" / f"{split}.jsonl", anatomy)
    questions = []
    for item in json.loads((bench / "arc_easy" / "test.json").read_text())[:60]:
        question, _, rest = (
            item["instruction"]
            .removeprefix("Please choose the correct answer to the question: ")
            .partition("\n\nAnswer1: ")
        )
        texts = (
            rest.split("\n\nAnswer format")[0]
            .replace(" Answer2: ", "\0")
            .replace(" Answer3: ", "\0")
            .replace(" Answer4: ", "\0")
            .split("\0")
        )
        labels = list("1234")[: len(texts)]
        questions.append(
            {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": item["answer"][-1]}
        )
    write_lines(root / "arc_easy" / "test.jsonl", questions)
    return (Task("winogrande", 2), Task("lambada_openai"), Task("mmlu_anatomy", 0), Task("arc_easy"))


@pytest.mark.skipif(not ASSETS, reason="MINITRON_TEST_ASSETS names no folder with a real model and real items")
@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_real_items_on_a_real_model(pool: Pool, tmp_path: Path, layout: str) -> None:
    tasks, model = assets(tmp_path), Path(str(ASSETS)) / "hf" / "stories260K"
    truth = reference(model, tmp_path, tasks)
    for found in pool.run(megatron, model, tmp_path, tasks, True, **LAYOUTS[layout]):
        assert expect_alike(found, truth) > 300
