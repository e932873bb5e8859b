"""Preference pairs as tokens: one prompt, a chosen and a rejected response."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .chat import Conversation, Preference
from .chat_encode import ChatEncoder
from .document import Fields
from .hub import every_file
from .readers import documents
from .template import ChatError, load_template
from .tokenizer import end_of_document, load_tokenizer

__all__ = ["PreferencePair", "preference_pairs"]


class PreferencePair(NamedTuple):
    prompt: NDArray[np.int64]
    """Token ids, generation prompt included."""
    chosen: NDArray[np.int64]
    """Token ids of the response, with its end."""
    rejected: NDArray[np.int64]
    rewards: tuple[float, float] | None
    """Rewards of the chosen and the rejected response, where the record has them."""
    place: str
    """File and line, item or row of the record."""


def preference_pairs(sources: Sequence[str | Path], tokenizer: str | Path) -> Iterator[PreferencePair]:
    """Yield the pairs of files, folders, globs and data sets of the Hub: `prompt`, `chosen` and `rejected`, each text
    or messages.

    They are read and rendered as chats are; a response is what the assistant writes in its turn. Raises DataError,
    which names the place, for a record that is no pair, or whose prompt differs between the two.
    """
    reader = load_tokenizer(tokenizer)
    end = end_of_document(tokenizer, reader)
    encoder = ChatEncoder(reader, end, np.int64, load_template(tokenizer), "assistant")
    for file in every_file(sources):
        for document in documents(file, Fields(form="preference")):
            try:
                yield _pair(encoder, json.loads(document.text), document.place)
            except ChatError as error:
                raise DataError(f"{document.place} cannot be tokenized: {error.args[0]}. {error.args[1]}") from error


def _pair(encoder: ChatEncoder, pair: Preference, place: str) -> PreferencePair:
    prompt, chosen = _split(encoder, pair, "chosen")
    other, rejected = _split(encoder, pair, "rejected")
    if not np.array_equal(prompt, other):
        raise ChatError("its prompt has other tokens before the rejected response", "Correct the template.")
    better, worse = pair.get("rewards", (None, None))
    rewards = None if better is None or worse is None else (better, worse)
    return PreferencePair(prompt, chosen, rejected, rewards, place)


def _split(encoder: ChatEncoder, pair: Preference, which: str) -> tuple[NDArray, NDArray]:
    """Return the tokens before the assistant's last turn, and those of the turn with the end of the conversation.

    The two are tokenized apart, as when a model answers: no token lies across the border, whatever the response.
    """
    conversation = Conversation(messages=[*pair["prompt"], pair[which]])  # type: ignore[literal-required]
    if "tools" in pair:
        conversation["tools"] = pair["tools"]
    text, spans = encoder.template.turns(conversation)
    start = spans[-1][0]
    turn = 1 + sum(message["role"] == "assistant" for message in pair["prompt"])
    if len(spans) < turn or not text[start:].strip():
        raise ChatError("its response has no tokens of its own", "Correct the record, or the template.")
    prompt, response = (encoder.ids(part) for part in (text[:start], text[start:]))
    if not encoder.ends(text):
        response = np.append(response, encoder.end)
    return prompt, response
