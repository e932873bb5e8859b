"""Conversations become tokens by the tokenizer's chat template, and each token knows whether it is trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from minitron_megatron.data import Corpus, prepare, step_batches
from minitron_megatron.data.chat import record_document
from minitron_megatron.data.chat_encode import COUNTS, LAST, ChatEncoder, LossOn
from minitron_megatron.data.document import Fields
from minitron_megatron.data.template import load_template
from minitron_megatron.data.tokenizer import end_of_document, load_tokenizer
from minitron_megatron.errors import DataError
from tests.chats import CONVERSATIONS, ENDS, SPECIAL, TEMPLATES, TOOLS, write_tokenizer

CHAT = Fields(form="chat")
CALL = '{"name": "weather", "%s": {"day": 3}}'


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return template's name -> the folder of its tokenizer."""
    root = tmp_path_factory.mktemp("chats")
    return {name: write_tokenizer(root / name, template, ENDS[name]) for name, template in TEMPLATES.items()}


def encoder_of(folder: Path, loss_on: LossOn = "assistant") -> ChatEncoder:
    tokenizer = load_tokenizer(folder)
    return ChatEncoder(tokenizer, end_of_document(folder, tokenizer), "int32", load_template(folder), loss_on)


def chatml(name: str, *, marked: bool) -> list[tuple[str, bool]]:
    """Return the pieces of a conversation in ChatML, and whether the assistant wrote each."""
    pieces: list[tuple[str, bool]] = []
    system = {"many": "You are brief.", "tools": f"# Tools\n{json.dumps(TOOLS[0])}\n"}.get(name)
    if system:
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    for message in CONVERSATIONS[name]["messages"]:
        role, text = message["role"], message["content"]
        if role == "user":
            text = text if isinstance(text, str) else "One and two?"
            pieces.append((f"<|im_start|>user\n{text}<|im_end|>\n", False))
        elif role == "assistant":
            call = f"\n<tool_call>\n{CALL % 'arguments'}\n</tool_call>" if "tool_calls" in message else ""
            pieces += [("<|im_start|>assistant\n", False), (f"{text}{call}<|im_end|>", True), ("\n", not marked)]
        elif text == "sun":
            responses = "".join(f"\n<tool_response>\n{each}\n</tool_response>" for each in ("sun", "wind"))
            pieces.append((f"<|im_start|>user{responses}<|im_end|>\n", False))
    return pieces


def llama3(name: str) -> list[tuple[str, bool]]:
    pieces = [("<|begin_of_text|>", False)]
    for message in CONVERSATIONS[name]["messages"]:
        role, text = message["role"].replace("tool", "ipython"), message["content"]
        text = CALL % "parameters" if "tool_calls" in message else text if isinstance(text, str) else "One and two?"
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        pieces.append((f"{text.strip()}<|eot_id|>", role == "assistant"))
    return pieces


def nemotron(name: str) -> list[tuple[str, bool]]:
    system = {"many": "\nYou are brief.", "tools": f"\n<tool> {json.dumps(TOOLS[0])} </tool>"}.get(name, "")
    pieces = [(f"<extra_id_0>System{system}\n\n", False)]
    for message in CONVERSATIONS[name]["messages"]:
        if message["role"] != "system":
            text = message["content"] if isinstance(message["content"], str) else "One and two?"
            pieces.append((f"<extra_id_1>{message['role'].capitalize()}\n", False))
            pieces.append((f"{text.strip()}\n", message["role"] == "assistant"))
    return [*pieces, ("<|endoftext|>", True)]  # the template ends no turn


TRUTH: dict[str, Callable[[str], list[tuple[str, bool]]]] = {
    "chatml": lambda name: chatml(name, marked=False),
    "marked": lambda name: chatml(name, marked=True),
    "llama3": llama3,
    "nemotron": nemotron,
}


def counted(ids: list[int], tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> list[bool]:
    """Return whether the last byte of each token is in a piece that the assistant wrote, by the tokens' bytes."""
    owner = [mine for text, mine in pieces for _ in text.encode()]
    at, found = 0, []
    for token in ids:
        word = tokenizer.id_to_token(token)
        at += len(word.encode()) if word in SPECIAL else len(word)  # a character of a byte-level token is a byte
        found.append(owner[at - 1])
    assert at == len(owner)
    return found


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_count_where_the_assistant_wrote_them(template: str, name: str, folders: dict[str, Path]) -> None:
    encoder, pieces = encoder_of(folders[template]), TRUTH[template](name)
    [(ids, marks)] = encoder([document(CONVERSATIONS[name])])
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "".join(text for text, _ in pieces)
    truth = counted(ids.tolist(), encoder.tokenizer, pieces)
    assert ((marks & COUNTS) > 0).tolist() == truth and len(set(truth)) == 2
    assert ((marks & LAST) > 0).tolist() == [False] * (len(ids) - 1) + [True]
    [(same, every)] = encoder_of(folders[template], "all")([document(CONVERSATIONS[name])])
    assert same.tolist() == ids.tolist() and (every & COUNTS).all() and every[-1] == COUNTS + LAST


def document(record: dict[str, Any]) -> str:
    return record_document(record, CHAT, 0, "here").text


def test_masks_are_those_of_transformers(folders: dict[str, Path]) -> None:
    """In `one`, transformers leaves out the assistant's first token, a space, which has no offsets."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(folders["marked"]))
    for name in ("many", "tools"):
        record = CONVERSATIONS[name]
        [(ids, marks)] = encoder_of(folders["marked"])([document(record)])
        messages = json.loads(document(record))["messages"]
        made = theirs.apply_chat_template(
            messages, tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        assert made["input_ids"] == ids.tolist(), name
        assert made["assistant_masks"] == (marks & COUNTS).tolist(), name


def write(file: Path, *records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def columns(prefix: Path) -> tuple[list[int], list[int]]:
    """Return the tokens and the marks of a prepared split."""
    return np.fromfile(f"{prefix}.bin", np.uint16).tolist(), np.fromfile(f"{prefix}.mask.bin", np.uint8).tolist()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_prepare_goes_on_to_the_same_tokens_and_marks(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[prepare.__module__], "BATCH_CHARS", 200)
    monkeypatch.setattr("minitron_megatron.data.token_writer.SAVE_SECONDS", 0.0)
    source, folder = write(tmp_path / "in" / "a.jsonl", *list(CONVERSATIONS.values()) * 8), folders["chatml"]
    seen: list[object] = []

    def stop(event: object) -> None:
        seen.append(event)
        if len(seen) == 5:
            raise KeyboardInterrupt

    def made(name: str, **options: Any) -> dict[str, bytes]:
        prepare([source], folder, tmp_path / name / "a", validation=0.2, chat="assistant", **options)
        return snapshot(tmp_path / name)

    whole = made("whole")
    with pytest.raises(KeyboardInterrupt):
        made("x", listener=stop)
    with (tmp_path / "x" / "a.partial" / "train.mask.bin").open("ab") as torn:
        torn.write(b"written after the last save")
    first: list[Any] = []
    assert made("x", listener=first.append) == whole and first[0].done > source.stat().st_size / 8
    assert len(whole) == 10 and json.loads(whole["a.train.json"])["mask"]["bin"]
    few = made("y", enough={"train": 300, "valid": 10})
    assert {"a.progress.json"} == few.keys() - whole.keys() and made("y") == whole
    (tmp_path / "y" / "a.train.mask.bin").write_bytes(bytes(len(whole["a.train.mask.bin"])))
    with pytest.raises(DataError, match=r"a\.train\.mask\.bin has changed"):
        Corpus([(tmp_path / "y" / "a", 1.0)], sequence=8, samples=4, seed=0, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"is a tokenized chat, whose mask would be lost\. Name the chats themselves\."):
        prepare([tmp_path / "x" / "a.train"], folder, tmp_path / "z" / "a", validation=0)


def test_every_sample_has_the_marks_of_its_labels(folders: dict[str, Path], tmp_path: Path) -> None:
    """Samples are cut amid turns; `<|im_end|>`, here also the end-of-document token, does not end a chat."""
    folder, text = (
        folders["chatml"],
        write(tmp_path / "t.jsonl", *({"text": f"One {i} <|im_end|> two"} for i in range(30))),
    )
    chats = write(tmp_path / "c.jsonl", *list(CONVERSATIONS.values()) * 4)
    made = prepare([chats], folder, tmp_path / "chat", validation=0, chat="assistant")
    prepare([text], folder, tmp_path / "text", validation=0)
    tokens, marks = columns(made.train.prefix)
    assert sum(mark & LAST > 0 for mark in marks) == made.train.documents == 12 < tokens.count(made.end)

    def batches(name: str, end: int | None, count: int) -> Any:
        corpus = Corpus([(tmp_path / name, 1.0)], sequence=16, samples=count, seed=1, cache=tmp_path / "cache", end=end)
        return step_batches(corpus, 0, global_batch=count, micro_batch=count, dp_rank=0, dp=1)[0]

    apart, joined = batches("chat", made.end, 20), batches("chat", None, 20)
    windows = {tuple(tokens[at : at + 17]): at for at in range(len(tokens) - 16)}
    checked = 0
    for number, row in enumerate(torch.cat([apart.tokens, apart.labels[:, -1:]], 1).tolist()):
        if (at := windows.get(tuple(row))) is None:
            continue  # its documents are not neighbours on disk
        counts = [mark & COUNTS > 0 for mark in marks[at + 1 : at + 17]]
        last = [mark & LAST > 0 for mark in marks[at : at + 16]]
        assert joined.mask[number].tolist() == counts
        assert apart.mask[number].tolist() == [each and not end for each, end in zip(counts, last, strict=True)]
        assert apart.attention_context.documents[number].tolist() == np.cumsum([0, *last[:-1]]).tolist()
        checked += 1
    assert checked > 5 and joined.attention_context is None and not joined.mask.all() and joined.mask.any()
    blend = [(tmp_path / "chat", 1.0), (tmp_path / "text", 1.0)]
    corpus = Corpus(blend, sequence=16, samples=8, seed=1, cache=tmp_path / "cache", end=made.end)
    mixed = step_batches(corpus, 0, global_batch=8, micro_batch=8, dp_rank=0, dp=1)[0]
    plain = mixed.tokens == made.end
    ends = torch.cat([torch.zeros(8, 1, dtype=torch.bool), mixed.attention_context.documents.diff(dim=1) > 0], 1)[:, 1:]
    assert sum(row.equal(end[:-1]) for row, end in zip(ends, plain, strict=True)) >= 4  # the rows of text


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
THINKING = (
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"in.jsonl:1 holds the key 'text', and a chat has messages, or prompt and response"),
        ([USER], "in.jsonl:1 is not a chat: it holds a list"),
        ({"messages": "a"}, "no list of messages under the key 'messages': its value is text"),
        ({"messages": []}, "no list of messages under the key 'messages': its value is an empty list"),
        (
            {"messages": [USER, "b"]},
            r"in.jsonl:1, messages\[1\] is text. Each message must be an object with role and content\.",
        ),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            r"in.jsonl:1, messages\[0\] holds the keys 'from', 'value', and a message has role and content\. Rename i",
        ),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            r"messages\[0\] has the role 'usr', and the roles are .*\. Did you mean 'user'\? Rename it\.",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"in.jsonl:1, messages\[0\] has no text as content; its value is a number\. Correct it, or remove it\.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"messages\[0\] has content that is not text: part 0 is of type 'image_url'\. Remove the record\.",
        ),
        ({"messages": [USER, ANSWER], "tools": "weather"}, "has tools that are not a list of JSON schemas, but text"),
        ({"messages": [USER, ANSWER], "tools": ["x"]}, r"in.jsonl:1, tools\[0\] is text, and not a JSON schema"),
        ({"messages": [USER]}, "in.jsonl:1 cannot be tokenized: it has no assistant turn. Remove it, or set loss_on"),
        (
            {"prompt": "a", "response": [USER]},
            "has a response that does not end with an assistant turn. Correct it, or",
        ),
    ],
)
def test_what_is_no_chat_is_refused_by_its_place(
    record: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    write(tmp_path / "in.jsonl", record)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "in.jsonl"], folders["chatml"], tmp_path / "out" / "a", validation=0, chat="assistant")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, which a source of the format chat needs"),
        ("{{ messages[0]['content'] }}", "writes nothing for the assistant's turns"),
        (THINKING, r"the assistant's turn messages\[1\] in another way when more messages follow"),
        (
            "{{ raise_exception('Roles must alternate.\nx') }}",
            "cannot be applied: Roles must alternate. C",
        ),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot be applied: access to attribute '__class__'"),
        ("{% for %}", "the chat template cannot be applied"),
    ],
)
def test_templates_that_cannot_be_used_are_one_message(template: str | None, message: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", template, "<|endoftext|>")
    write(tmp_path / "in.jsonl", {"messages": [USER, ANSWER, USER, ANSWER]})
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "in.jsonl"], folder, tmp_path / "out" / "a", validation=0, chat="assistant")


def test_pairs_of_prompt_and_response_and_tables_are_chats(folders: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = {"messages": [USER, ANSWER]}
    write(tmp_path / "chat.jsonl", chat, chat, chat)
    write(tmp_path / "pair.jsonl", {"prompt": "a", "response": "b"}, {"prompt": [USER], "completion": [ANSWER]}, chat)
    pq.write_table(pa.Table.from_pylist([{"id": 1, **chat}] * 3), tmp_path / "table.parquet")
    made = [
        prepare([tmp_path / name], folders["llama3"], tmp_path / name, validation=0, chat="assistant").content
        for name in ("chat.jsonl", "pair.jsonl", "table.parquet")
    ]
    assert len(set(made)) == 1
    with pytest.raises(DataError, match=r"a\.txt is plain text and holds no chats\. Give \.jsonl, \.json, "):
        (tmp_path / "a.txt").write_text("a")
        prepare([tmp_path / "a.txt"], folders["llama3"], tmp_path / "x", validation=0, chat="assistant")


def test_a_table_without_a_chats_columns_names_them(folders: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        prepare([tmp_path / "a.parquet"], folders["chatml"], tmp_path / "a", validation=0, chat="assistant")
    assert str(caught.value) == (
        f"{tmp_path}/a.parquet holds the column 'text', and chats have messages, or prompt and response, each once. "
        "Rename its columns."
    )


ARROW_MAP = r"holds an Arrow map, which a chat cannot have\. Write it as a struct, or as JSON\."


def test_a_tables_records_are_those_of_json(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a table each struct has the keys of all of its column; those that a record lacks are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def called(arguments: object) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {"messages": [USER, ANSWER | {"tool_calls": [call]}], "tools": TOOLS}

    records = [called({"day": 3}), called({"place": "x"}), {"messages": [USER, ANSWER]}]
    write(tmp_path / "a.jsonl", *records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    made = [
        prepare([tmp_path / name], folders["chatml"], tmp_path / name, validation=0, chat="assistant").content
        for name in ("a.jsonl", "a.parquet")
    ]
    assert made[0] == made[1]
    pairs = pa.array([[("day", "3")]], pa.map_(pa.string(), pa.string()))
    for value, message in ((b"x", "holds a value that JSON does not have: .*bytes"), (pairs, ARROW_MAP)):
        column = pa.array([value]) if isinstance(value, bytes) else value
        table = pa.table(
            {
                "prompt": ["a"],
                "response": pa.StructArray.from_arrays(
                    [pa.array(["assistant"]), pa.array(["b"]), column], ["role", "content", "x"]
                ),
            }
        )
        pq.write_table(table, tmp_path / "b.parquet")
        with pytest.raises(DataError, match=rf"b\.parquet, row 0 {message}"):
            prepare([tmp_path / "b.parquet"], folders["chatml"], tmp_path / "b", validation=0, chat="assistant")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_twice_anywhere_in_a_chat_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    twice = '{"role": "user", "role": "system", "content": "x"}'
    (tmp_path / name).write_text(f'{json.dumps({"messages": [USER, ANSWER]})}\n{{"messages": [{twice}]}}\n')
    with pytest.raises(DataError, match=rf"{name}:2.* has the key 'role' twice"):
        prepare([tmp_path / name], folders["chatml"], tmp_path / "out" / "a", validation=0, chat="assistant")
