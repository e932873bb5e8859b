"""Conversations become tokens by the tokenizer's chat template, and each token knows whether it is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from minitron_megatron.data.chat import record_document
from minitron_megatron.data.chat_encode import COUNTS, LAST, ChatEncoder, LossOn
from minitron_megatron.data.document import Fields
from minitron_megatron.data.template import load_template
from minitron_megatron.data.tokenizer import end_of_document, load_tokenizer
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
