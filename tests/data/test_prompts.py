"""Records of prompts keep all of their keys, in every format."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from minitron_megatron.data import PromptRecord, chat_codec, read_prompts
from minitron_megatron.errors import DataError
from tests.chats import write_tokenizer

ROWS = [
    {"prompt": "a", "answer": 3, "responses": ["b", "c"], "rewards": [1.0, 2.0]},
    {"prompt": "b", "answer": 4, "responses": ["d"], "rewards": [-1.0]},
]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_tables_and_lines_give_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for rated in (False, True):
        lines, rows = ([*read_prompts([tmp_path / name], rated=rated)] for name in ("a.jsonl", "a.parquet"))
        assert [each.record for each in lines] == [each.record for each in rows]
        assert lines[1].record["prompt"] == [turn("user", "b")] and lines[1].record["answer"] == 4
        assert lines[1].record["responses"] == ([turn("assistant", "d")] if rated else ["d"])
        assert (lines[1].place, rows[1].place) == (f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.parquet, row 1")
    assert [each.record["prompt"][0]["content"] for each in read_prompts([tmp_path / "a.jsonl"], limit=1)] == ["a"]


def test_a_date_in_a_table_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": "a", "day": datetime.date(2026, 1, 1)}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 0 holds a value that JSON does not have: .*date"):
        list(read_prompts([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ '' }}", "in.jsonl:1 becomes no tokens. Correct the record, or the chat template."),
        (
            "{{ raise_exception('No.') }}",
            "in.jsonl:1 cannot be tokenized: the chat template cannot be applied: No. Correct the record, or the "
            "template.",
        ),
    ],
)
def test_a_prompt_without_tokens_is_named(template: str, said: str, tmp_path: Path) -> None:
    codec = chat_codec(write_tokenizer(tmp_path, template, "<|endoftext|>"))
    with pytest.raises(DataError) as caught:
        codec.prompt(PromptRecord({"prompt": [turn("user", "a")]}, "in.jsonl:1"))
    assert str(caught.value) == said


def test_an_answer_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    codec = chat_codec(write_tokenizer(tmp_path, "{{ raise_exception('No.') }}", "<|endoftext|>"))
    with pytest.raises(DataError) as caught:
        codec.answered({"prompt": [turn("user", "a")]}, "b")
    assert str(caught.value) == (
        "an answer cannot be tokenized: the chat template cannot be applied: No. Correct the record, or the template."
    )
