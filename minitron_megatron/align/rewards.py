"""Rewards of answers to prompts, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import PromptRecord
from ..errors import DataError, RecipeError
from ..evaluate import which_pass
from ..registry import Registry
from .final_answer import is_correct

__all__ = ["REWARDS", "Rate", "Record", "Reward", "program_in"]

Record = Mapping[str, Any]
"""Keys of a prompt's record; `prompt` is a list of messages."""
Rate = Callable[[Sequence[Record], Sequence[str]], Sequence[float]]
"""(records, responses) -> rewards: one record, one response and one finite number for each answer."""

PYTHON = ("python", "py", "python3")
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
"""A block of code; one that a response leaves open goes to the end."""


@dataclass(frozen=True)
class Reward:
    """How good answers are (a plugin point)."""

    rate: Rate
    """Called on the first rank alone, with several answers at a time."""
    needs: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    """Key that each record must have -> types of its value, which must not be empty."""
    runs_code: bool = False
    """Whether it executes what the model writes, so that the user must allow it."""

    def check(self, name: str, prompts: Sequence[PromptRecord], run_code: bool) -> None:
        """Raise RecipeError if the reward may not run, and DataError for a record that it cannot rate."""
        if self.runs_code and not run_code:
            raise RecipeError(
                f"the reward {name} runs programs that a model wrote, on this machine and with your permissions. "
                "Set `run_code` if this is acceptable, as in a container without a network."
            )
        for key, kinds in self.needs.items():
            for record, place in prompts:
                value = record.get(key)
                of_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
                if not of_kind or value in ("", []):
                    told = f"{key} is {str(value)[:40]!r}" if key in record else f"there is no {key}"
                    raise DataError(
                        f"{place} cannot be rated by the reward {name}: {told}. Give each record "
                        f"{key}: {' or '.join(KINDS.get(kind, kind.__name__) for kind in kinds)}."
                    )


KINDS: Mapping[type, str] = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def _final_answers(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
    """Return 1 where a response's final answer equals the record's `answer`, else 0."""
    return [float(is_correct(each, record["answer"])) for record, each in zip(records, responses, strict=True)]


def _programs(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
    """Return 1 where a response's program passes the record's `tests`, else 0."""
    pairs = zip(records, responses, strict=True)
    return list(map(float, which_pass([f"{program_in(each)}\n{_tests(record)}\n" for record, each in pairs])))


def _tests(record: Record) -> str:
    tests = record["tests"]
    return tests if isinstance(tests, str) else "\n".join(map(str, tests))


def program_in(response: str) -> str:
    """Return the Python program in a response: its blocks of Python one after the other; else its first block without a
    language; else the whole response."""
    blocks = [(language.lower(), code) for language, code in FENCE.findall(response)]
    python = [code for language, code in blocks if language in PYTHON]
    plain = [code for language, code in blocks if not language]
    return "\n".join(python or plain[:1]) if python or plain else response


REWARDS: Registry[Reward] = Registry(
    "reward",
    {
        "answer": Reward(_final_answers, needs={"answer": (str, int, float)}),
        "code": Reward(_programs, needs={"tests": (str, list)}, runs_code=True),
    },
)
