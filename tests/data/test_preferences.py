"""Preference pairs are read and rendered as chats are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.data import load_tokenizer, preference_pairs
from minitron_megatron.errors import DataError
from tests.chats import CHATML, MARKED, write_tokenizer
from tests.data.test_chat import ANSWER, USER, write

OTHER = {"role": "assistant", "content": "c"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("pairs"), CHATML, "<|endoftext|>")


def test_a_pair_is_a_prompt_and_two_responses(folder: Path, tmp_path: Path) -> None:
    texts: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
    lists = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    longer = {"prompt": [USER, ANSWER, USER], "chosen": OTHER, "rejected": [ANSWER]}
    rewarded = texts | {"chosen_reward": 2, "rejected_reward": -0.5}
    spaced = {"prompt": "a", "chosen": "\n\nb", "rejected": "\nc"}  # "\n\n" is one token, of prompt and response
    pairs = list(preference_pairs([write(tmp_path / "a.jsonl", texts, lists, longer, rewarded, spaced)], folder))
    decode = load_tokenizer(folder).decode
    said = [[decode(part.tolist(), skip_special_tokens=False) for part in pair[:3]] for pair in pairs]
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    ends = "<|im_end|>\n<|endoftext|>"
    assert said[0] == said[1] == said[3] == [prompt, f"b{ends}", f"c{ends}"]
    assert said[2] == [f"{prompt}b<|im_end|>\n{prompt}", f"c{ends}", f"b{ends}"]
    assert said[4] == [prompt, f"\n\nb{ends}", f"\nc{ends}"]
    assert [pair.rewards for pair in pairs] == [None, None, None, (2.0, -0.5), None]


def test_the_end_of_a_conversation_is_part_of_the_response(tmp_path: Path) -> None:
    """The marks of a template leave out the line break before the end that is added."""
    folder = write_tokenizer(tmp_path / "marked", MARKED, "<|endoftext|>")
    row = {"prompt": [USER, ANSWER, USER], "chosen": "b", "rejected": ""}
    [pair] = preference_pairs([write(tmp_path / "a.jsonl", row)], folder)
    decode = load_tokenizer(folder).decode
    ends = "<|im_end|>\n<|endoftext|>"
    assert [decode(part.tolist(), skip_special_tokens=False) for part in pair[1:3]] == [f"b{ends}", ends]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            r"a\.jsonl:1 has no rejected; it holds the keys 'prompt', 'chosen'\. A pair needs both\.",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same response as chosen and as rejected"),
        ({"chosen": [USER, ANSWER], "rejected": [OTHER]}, "one response to the same prompt"),
        ({"chosen": "b", "rejected": "c"}, "one response to the same prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 1}, "needs numbers as chosen_reward and"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_reward": 1, "rejected_reward": float("-inf")},
            "needs numbers as chosen_reward and",
        ),
    ],
)
def test_what_is_no_pair_is_refused(record: object, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(preference_pairs([write(tmp_path / "a.jsonl", record)], folder))


def test_a_template_without_an_assistants_turn_is_refused(tmp_path: Path) -> None:
    only_users = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    folder = write_tokenizer(tmp_path / "users", only_users, "<|endoftext|>")
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 cannot be tokenized: the chat template writes nothing for the assi"
    ):
        list(preference_pairs([file], folder))


OPENS_WITH_THE_ANSWER = (
    "{{ messages[-1].content }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)
LEAVES_THE_ANSWER_OUT = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (OPENS_WITH_THE_ANSWER, "its prompt has other tokens before the rejected response. Correct the template."),
        (LEAVES_THE_ANSWER_OUT, "its response has no tokens of its own. Correct the record, or the template."),
    ],
)
def test_a_pair_that_its_template_cannot_part_is_refused(template: str, said: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", template, "<|endoftext|>")
    file = write(tmp_path / "a.jsonl", {"prompt": [USER, ANSWER, USER], "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError) as caught:
        list(preference_pairs([file], folder))
    assert str(caught.value) == f"{file}:1 cannot be tokenized: {said}"
