"""Prompts: records of messages that the assistant is to answer, as tokens, and answers as text again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ..errors import DataError
from .chat import Conversation, Message
from .document import Fields
from .hub import every_file
from .readers import documents
from .template import ChatError, ChatTemplate, load_template
from .tokenizer import end_of_document, load_tokenizer

__all__ = ["ChatCodec", "PromptRecord", "chat_codec", "read_prompts"]


class PromptRecord(NamedTuple):
    """One record of prompts."""

    record: dict[str, Any]
    """All keys of the record. `prompt` is a list of messages, and so is `responses` where the record is rated."""
    place: str
    """File and line, item or row of the record."""


def read_prompts(
    sources: Sequence[str | Path], *, rated: bool = False, limit: int | None = None
) -> Iterator[PromptRecord]:
    """Yield the prompts of files, folders, globs and data sets of the Hub: `prompt`, text or messages, or `messages`.

    rated: the records also have `responses` and `rewards`, two lists of one length. limit: number of prompts at most.
    Raises DataError, which names the place, for a record of another form.
    """
    fields = Fields(form="rated" if rated else "prompt")
    found = (document for file in every_file(sources) for document in documents(file, fields))
    for document in islice(found, limit):
        yield PromptRecord(json.loads(document.text), document.place)


@dataclass(frozen=True)
class ChatCodec:
    """Conversations to token ids, and the ids of an answer to its text."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int
    """Id of the token that ends a document."""

    def prompt(self, prompt: PromptRecord) -> list[int]:
        """Return the ids of a prompt up to where the answer begins. Raises DataError, which names the place."""
        try:
            ids = self._ids(self.template.prompt(self._conversation(prompt.record)))
        except ChatError as error:
            raise DataError(f"{prompt.place} cannot be tokenized: {error.args[0]}. {error.args[1]}") from error
        if not ids:
            raise DataError(f"{prompt.place} becomes no tokens. Correct the record, or the chat template.")
        return ids

    def answered(self, record: dict[str, Any], answer: str) -> list[int]:
        """Return the ids of a prompt and its answer. Raises DataError where the template cannot render them."""
        conversation = self._conversation(record)
        conversation["messages"] += [Message(role="assistant", content=answer)]
        try:
            return self._ids(self.template.text(conversation))
        except ChatError as error:
            raise DataError(f"an answer cannot be tokenized: {error.args[0]}. {error.args[1]}") from error

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def ends(self) -> frozenset[int]:
        """Return the ids that end an answer: the end of a document, and a special token that the template writes right
        after the assistant's text."""
        probe = "answer"
        messages = [Message(role="user", content="prompt"), Message(role="assistant", content=probe)]
        try:
            after = self.template.text(Conversation(messages=messages)).rpartition(probe)[2]
        except ChatError:  # a template that takes no such conversation
            return frozenset({self.end})
        special = self.tokenizer.get_added_tokens_decoder()
        first = self._ids(after)[:1]
        return frozenset({self.end, *(at for at in first if at in special and special[at].special)})

    def _conversation(self, record: dict[str, Any]) -> Conversation:
        conversation = Conversation(messages=list(record["prompt"]))
        if "tools" in record:
            conversation["tools"] = record["tools"]
        return conversation

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def chat_codec(folder: str | Path) -> ChatCodec:
    """Return the codec of a Hugging Face folder. Raises DataError without a tokenizer or a chat template."""
    tokenizer = load_tokenizer(folder)
    return ChatCodec(tokenizer, load_template(folder), end_of_document(folder, tokenizer))
