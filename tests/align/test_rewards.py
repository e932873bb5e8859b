"""Rewards of answers, against tables of texts that are easily misread, and against transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.align import REWARDS, AnswerSettings, Reward
from minitron_megatron.align.final_answer import is_correct
from minitron_megatron.align.reward_model import load_reward_model
from minitron_megatron.align.rewards import program_in
from minitron_megatron.data import PromptRecord
from minitron_megatron.errors import DataError, ModelError, RecipeError
from minitron_megatron.evaluate import programs
from tests.chats import CHATML, write_tokenizer

CORRECT: list[tuple[str, str | float]] = [
    ("It costs 1,200 at first.\n#### 1,234", "She pays 1,234 dollars.\n#### 1234"),
    ("18, no: 19. #### 18\nI am sure, 100%.", 18),
    ("#### -1,000.", -1000),
    ("so 5 - 3 = 2.", "2"),
    ("10-3", 3),
    ("x is \N{MINUS SIGN}7", "-7"),
    ("about 3/4 of it", "0.75"),
    ("1.50 in all...", 1.5),
    ("it is .5", 0.5),
    ("1e3", 1000),
    ("$1,234.50", 1234.5),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{-\dfrac{3}{4}}", -0.75),
    (r"Not \boxed{3} but \boxed{\boxed{4}}, 5 times \boxed{6", r"so \boxed{4}"),
    (r"$\boxed{18\text{ cm}^2}$.", "18"),
    (r"\boxed{18 km/h}", 18),
    (r"\boxed{x = 5}", 5),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{90^\circ}", 90),
    (r"\boxed{\left( 1,\, 2 \right)}", "(1,2)"),
    (r"\boxed{\text{(A)}}", "(A)"),
    (r"\boxed{\sqrt2}", r"\sqrt{2}"),
    (r"\boxed{2x + 1}", "2x+1"),
    (r"\boxed{\frac{1}{0}}", r"\frac10"),
]
WRONG: list[tuple[str, str | float]] = [
    ("", 0),
    ("no number", 0),
    ("#### 18 or 20", 20),
    ("\\boxed{}", ""),
    (r"\boxed{2x}", 2),
    (r"\boxed{5 \text{ or } 6}", 6),
    (r"\boxed{3}, that is 4", 4),
    ("10-3", -3),
    ("x2", 2),
    ("0.333", "1/3"),
    ("1,23", 123),
    ("1e9999999999", 1),
    ("9" * 5000, 9),
    (r"\boxed{a}", "A"),
]


@pytest.mark.parametrize(("response", "truth"), CORRECT)
def test_equal_answers(response: str, truth: str | float) -> None:
    assert is_correct(response, truth)


@pytest.mark.parametrize(("response", "truth"), WRONG)
def test_unequal_answers(response: str, truth: str | float) -> None:
    assert not is_correct(response, truth)


def test_many_open_braces_take_no_time() -> None:
    assert not is_correct(r"\boxed{\frac{" * 20_000 + "1" * 20_000, 3)


ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
RESPONSES = {
    "bare": (ADD, 1.0),
    "fenced": (f"Sure:\n```python\n{ADD}```\nIt adds.", 1.0),
    "corrected": (f"```python\ndef add(a, b): return a\n```\nBetter:\n```py\n{ADD}```\nOutput:\n```\n3, [\n```", 1.0),
    "no language": (f"  ```\n{ADD}  ```\n```\n3 3\n```", 1.0),
    "shell first": (f"```bash\npip install add\n```\n```Python\n{ADD}```", 1.0),
    "cut off": (f"```python\n{ADD}", 1.0),
    "wrong": ("```python\ndef add(a, b): return a * b\n```", 0.0),
    "endless": ("```python\nimport time\nwhile True: time.sleep(0.1)\n```", 0.0),
    "exits": ("```python\nraise SystemExit(0)\n```", 0.0),
    "nothing": ("", 0.0),
}


def test_programs_are_run_against_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "passes", partial(programs.passes, seconds=2.0))
    records = [{"tests": TESTS if number % 2 else "\n".join(TESTS)} for number in range(len(RESPONSES))]
    texts, rewards = zip(*RESPONSES.values(), strict=True)
    assert REWARDS["code"].rate(records, texts) == list(rewards)
    assert program_in("```python\na\n```\nand\n```python\nb\n```") == "a\n\nb\n"


@pytest.mark.parametrize(
    ("reward", "record", "message"),
    [
        ("answer", {"solution": "3"}, "a.jsonl:2 cannot be rated by the reward answer: there is no answer. Give each"),
        ("answer", {"answer": True}, "answer is 'True'. Give each record answer: text or a whole number or a number"),
        ("answer", {"answer": ""}, "answer is ''"),
        ("code", {"tests": []}, r"tests is '\[\]'. Give each record tests: text or a list"),
        ("code", {"tests": {}}, "tests is '{}'"),
    ],
)
def test_a_record_that_cannot_be_rated_is_named(reward: str, record: dict[str, Any], message: str) -> None:
    fine = PromptRecord({"answer": 0, "tests": "assert 1"}, "a.jsonl:1")
    with pytest.raises(DataError, match=message):
        REWARDS[reward].check(reward, [fine, PromptRecord(record, "a.jsonl:2")], run_code=True)


def test_code_runs_only_where_it_may() -> None:
    with pytest.raises(RecipeError) as caught:
        REWARDS["code"].check("code", [], run_code=False)
    assert str(caught.value) == (
        "the reward code runs programs that a model wrote, on this machine and with your permissions. Set `run_code` "
        "if this is acceptable, as in a container without a network."
    )
    Reward(lambda records, responses: []).check("other", [PromptRecord({}, "")], run_code=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": "answers"}, "there is no such reward. Did you mean 'answer'"),
        ({"reward": "model"}, "reward_model is given if and only if reward is model"),
        ({"reward_model": "folder"}, "reward_model is given if and only if reward is model"),
        ({"reward": "column", "top_p": 0.5}, "reward: column samples nothing, so top_p cannot apply"),
        ({"answers": 1}, "answers is 1"),
        ({"temperature": 0}, "temperature is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AnswerSettings(prompts="a.jsonl", **keys)


def write_reward_model(folder: Path, kind: str = "LlamaForSequenceClassification", **changes: Any) -> Path:
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": 432, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 5}
    config = transformers.LlamaConfig(**sizes | {"num_labels": 1} | changes)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return write_tokenizer(folder, CHATML, "<|im_end|>")


def test_a_reward_model_gives_the_logit_that_transformers_gives(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    folder = write_reward_model(tmp_path)
    rate = load_reward_model(folder, torch.device("cpu"))
    record = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]}
    answers = ["Two.", "", "\n Three, and more"]
    found = rate([record] * 3, answers)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for answer, reward in zip(answers, found, strict=True):
        chat = [*record["prompt"], {"role": "assistant", "content": answer}]
        tokens = tokenizer.apply_chat_template(chat, tokenize=True, return_tensors="pt", return_dict=True)
        assert reward == pytest.approx(model(**tokens).logits.item(), abs=1e-5)
    assert len(set(found)) == 3
    with pytest.raises(DataError, match=r"the conversation that ends with 'aaa.*for the reward model, which reads 64"):
        rate([record], ["a" * 300])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "LlamaForSequenceClassification",
            {"num_labels": 2},
            r"has 2 logits, and a reward is one number\. Give a sequence-cl",
        ),
        (
            "LlamaForCausalLM",
            {},
            r"has no weights for score\.weight, which transformers would draw at random\. Give a trained sequence-clas",
        ),
        ("pickle", {}, "cannot be loaded: .*safetensors"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    if kind == "pickle":
        folder = write_reward_model(tmp_path)
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        folder = write_reward_model(tmp_path, kind, **changes)
    with pytest.raises(ModelError, match=message):
        load_reward_model(folder, torch.device("cpu"))
