"""Long texts in pieces that have the tokens of the whole: a tokenizer needs some 150 bytes for each byte of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer

__all__ = ["LONG", "pieces"]

LONG = 1 << 20
"""Characters of a piece; shorter texts are not cut."""
WINDOW = 1 << 10
"""Characters on each side of a cut whose tokens are compared."""
TRIES = 100
"""Places to try for a cut."""
PLACE = re.compile(r"(?<=[^\W\d_])(?:\n(?=[^\W\d_])|(?= [^\W\d_]))")
"""Between two letters, after a line's end or before a space: there pre-tokenizers begin anew."""


def pieces(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a text in pieces of about `LONG` characters whose tokens, one after the other, are those of the text.

    It is cut where the tokens around the place are those of the two sides, and where the tokenizer has a pre-tokenizer:
    without one a token may depend on the whole text. What cannot be cut is one piece.
    """
    begin = 0
    while tokenizer.pre_tokenizer is not None and len(text) - begin > LONG:
        found = islice(PLACE.finditer(text, begin + LONG), TRIES)
        if (cut := next((match.end() for match in found if _separates(tokenizer, text, match.end())), None)) is None:
            break
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _separates(tokenizer: Tokenizer, text: str, at: int) -> bool:
    left, right = text[max(0, at - WINDOW) : at], text[at : at + WINDOW]
    both, one, other = tokenizer.encode_batch_fast([left + right, left, right], add_special_tokens=False)
    return bool(both.ids == one.ids + other.ids)
