"""Final answers of solutions in mathematics: where a text has one, and when two are equal."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["final_answer", "is_correct"]

BOXED, LINE, MINUS = "\\boxed{", "####", "\N{MINUS SIGN}"

UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
LAST = re.compile(rf"(?<![\w)\]}}.])-?(?:{UNSIGNED})(?:\s*/\s*(?:{UNSIGNED}))?")
"""A number in running text. A minus after a digit, a letter or a bracket is a subtraction."""
UNIT = r"(?:\s*%|\s*\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?|\s+[A-Za-z]{2,}(?:[ /][A-Za-z]+|\^\{?\d\}?)*)?"
"""A unit: a percent sign, words in `\\text{}`, or a word of two letters or more after a space."""
NUMBER = re.compile(rf"([-+]?)({UNSIGNED})(?:\s*/\s*({UNSIGNED}))?{UNIT}")
FRACTION = re.compile(rf"([-+]?)\s*\\frac\{{\s*([-+]?{UNSIGNED})\s*\}}\{{\s*([-+]?{UNSIGNED})\s*\}}{UNIT}")
MOST_CHARS = 200
"""Characters of a number at most; a longer text is compared as text."""

NOTHING = re.compile(r"\\left|\\right|\\displaystyle|\\[!,;: ]|\\[()\[\]]|\$|\\?°|\^\{?\\circ\}?")
"""Parts of LaTeX that say nothing about the value; of `\\$` and `\\%` only the backslash is."""
VARIABLE = re.compile(r"^[A-Za-z]\w*\s*=\s*")


def is_correct(response: str, truth: str | float) -> bool:
    """Return whether the final answer of a response equals the true one.

    truth: a number, an answer, or a solution that ends in one, in `\\boxed{}` or after `####`. Two answers are equal if
    their numbers are (`1,234` and `1234`, `\\frac12` and `0.5`, with or without a unit), or else if their LaTeX is,
    apart from spaces, delimiters and the name of a variable before an equals sign.
    """
    given, known = final_answer(response), str(truth).replace(MINUS, "-")
    return given is not None and _equal(given, _marked(known) or known)


def final_answer(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`; else the rest of the last line that has `####`; else the last number;
    None where the text has none of these."""
    text = text.replace(MINUS, "-")
    if marked := _marked(text):
        return marked
    numbers = LAST.findall(text)
    return numbers[-1] if numbers else None


def _marked(text: str) -> str | None:
    """Return the answer that a text marks as its own; None where it marks none."""
    for part in reversed(text.split(BOXED)[1:]):
        if (boxed := _braced(part)) is not None and boxed.strip():
            return boxed
    for part in reversed(text.split(LINE)[1:]):
        if line := part.partition("\n")[0].strip():
            return line
    return None


def _braced(text: str) -> str | None:
    """Return what comes before the brace that closes the one before the text; None where none does."""
    depth = 1
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:at]
    return None


def _equal(one: str, other: str) -> bool:
    one, other = _plain(one), _plain(other)
    numbers = _number(one), _number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _without_spaces(one) == _without_spaces(other)


def _plain(text: str) -> str:
    """Return an answer in one way of writing it, of the many that LaTeX has."""
    text = NOTHING.sub("", text.replace("\\$", "").replace("\\%", "%"))
    text = re.sub(r"\\[dt]frac", r"\\frac", text).strip().rstrip(".").strip()
    text = re.sub(r"\\(frac|sqrt)\s*(\w)", r"\\\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    return VARIABLE.sub("", text)


def _number(text: str) -> Fraction | None:
    """Return the value of a number, with or without a unit; None for any other text."""
    if len(text) > MOST_CHARS or not (found := NUMBER.fullmatch(text) or FRACTION.fullmatch(text)):
        return None
    sign, above, below = found.groups()
    over, under = (Fraction((part or "1").replace(",", "")) for part in (above, below))
    return None if under == 0 else over / under * (-1 if sign == "-" else 1)


def _without_spaces(text: str) -> str:
    return "".join(re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text).split())
