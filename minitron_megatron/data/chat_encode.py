"""Conversations to token ids, with a mark for each token."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Tokenizer

from .chat import Conversation
from .encode import Columns, EncodeError, foreign
from .template import ChatError, ChatTemplate, Spans

__all__ = ["COUNTS", "LAST", "MARK", "ChatEncoder", "LossOn"]

LossOn = Literal["assistant", "all"]

MARK = np.uint8
"""Type of a token's mark: the sum of those that apply."""
COUNTS, LAST = 1, 2
"""Marks: the token is trained on; it is the last one of its document."""


@dataclass(frozen=True)
class ChatEncoder:
    """The JSON of conversations to token ids and marks.

    A token counts if its last character is one that the assistant wrote. A conversation ends with `end`: with its own,
    if the template wrote it last, else with one that is added and belongs to the last turn.
    """

    tokenizer: Tokenizer
    end: int
    dtype: DTypeLike
    template: ChatTemplate
    loss_on: LossOn

    @property
    def types(self) -> list[DTypeLike]:
        """Types of the columns."""
        return [self.dtype, MARK]

    @property
    def marks(self) -> Sequence[object]:
        """Everything but the tokenizer that determines the columns."""
        return [self.loss_on, *self.template.marks, self.template.day]

    def __call__(self, texts: Sequence[str]) -> list[Columns]:
        return [self._columns(number, json.loads(text)) for number, text in enumerate(texts)]

    def _columns(self, number: int, conversation: Conversation) -> Columns:
        try:
            return self.encode(conversation)
        except ChatError as error:
            raise EncodeError(number, *error.args) from None
        except BaseException as error:
            if not foreign(error):
                raise
            raise EncodeError(number, str(error), "Correct the text, or the model's tokenizer.") from None

    def encode(self, conversation: Conversation) -> tuple[NDArray, NDArray]:
        """Return the ids and the marks of a conversation's tokens. Raises ChatError where it cannot be rendered."""
        if self.loss_on == "assistant":
            text, spans = self.template.turns(conversation)
        else:
            text = self.template.text(conversation)
            spans = [(0, len(text))]
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        ids, counts = list(encoded.ids), _within(encoded.offsets, spans)
        if not self.ends(text):
            ids.append(self.end)
            counts.append(self.loss_on == "all" or conversation["messages"][-1]["role"] == "assistant")
        marks = np.array(counts, MARK) * MARK(COUNTS)
        marks[-1] += LAST
        return np.array(ids, self.dtype), marks

    def ids(self, text: str) -> NDArray:
        """Return the ids of a text, without special tokens of the tokenizer's own."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)

    def ends(self, text: str) -> bool:
        """Return whether a conversation's text ends with `end` by itself."""
        return text.rstrip().endswith(str(self.tokenizer.id_to_token(self.end)))


def _within(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Return whether the last character of each token lies in a span.

    Ends alone are compared: byte-level tokenizers leave leading spaces out of a token's offsets.
    """
    spans = sorted(spans)
    ends = [end for _, end in spans]
    found = (bisect_left(ends, end) for _, end in offsets)
    return [at < len(spans) and spans[at][0] < end for at, (_, end) in zip(found, offsets, strict=True)]
