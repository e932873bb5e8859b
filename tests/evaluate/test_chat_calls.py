"""Function calls are read as syntax in the forms that chat templates give, and compared by the rules of BFCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.evaluate.chat.calls import calls_in
from minitron_megatron.evaluate.chat.match import all_match

F1 = ("f", {"a": 1})


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ("[f(a=1), g.h(b='x', c=[1, -2.5])]", [F1, ("g.h", {"b": "x", "c": [1, -2.5]})]),
        ("[f(d={'k': (1, None)})]", [("f", {"d": {"k": (1, None)}})]),
        ("f(a=1)", [F1]),
        ("`f(a=1)`\n", [F1]),
        ("f(1, b=x, c=60 * 5, d=g(2))", [("f", {"b": "x", "c": 300, "d": "g(2)"})]),
        ("f(a=2 ** 9 ** 9)", [("f", {"a": "2 ** 9 ** 9"})]),
        ('{"name": "f", "arguments": {"a": 1}}', [F1]),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "arguments": "{}"}]', [F1, ("g", {})]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', [F1, F1]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', [F1]),
        ('I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><tool_call>f(a=1)', [F1, F1]),
        ("<TOOLCALL>[f(a=1)]</TOOLCALL>", [F1]),
        ("[]", []),
        ("", []),
        ("I call f(a=1)", None),
        ("No function fits.", None),
        ("sorry", None),
        ("[f(a=1), 2]", None),
        ("f(**{'a': 1})", None),
        ("f(a={[]: 1})", None),
        ('{"a": 1}', None),
        ("f(a=1)\0", None),
        ("(" * 10_000, None),
    ],
)  # fmt: skip
def test_calls_are_read(answer: str, calls: Any) -> None:
    assert calls_in(answer) == calls


def test_nothing_of_an_answer_runs(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    assert calls_in(f"f(a={code}, b=[{code} for _ in '1'], c=1 / 0)") is None
    assert calls_in(f"f(a={code})") == [("f", {"a": code})]
    assert not list(tmp_path.iterdir())


PARAMETERS: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "share": {"type": "float"},
    "exact": {"type": "boolean"},
    "names": {"type": "array", "items": {"type": "string"}},
    "shares": {"type": "array", "items": {"type": "float"}},
    "size": {"type": "tuple", "items": {"type": "integer"}},
    "how": {"type": "dict"},
    "rows": {"type": "array", "items": {"type": "dict"}},
}
FUNCTION = {"name": "w.get", "parameters": {"type": "dict", "properties": PARAMETERS, "required": ["city"]}}
OTHER = {"name": "other", "parameters": {"type": "dict", "properties": {}}}
ALLOWED: dict[str, list[Any]] = {
    "city": ["New York, NY", "NYC"],
    "days": ["", 3],
    "share": ["", 0.5, 2.0],
    "exact": ["", True],
    "names": ["", ["A b", "c"]],
    "size": ["", [1, 2]],
    "how": ["", {"unit": ["C", "celsius"], "day": ["", 1]}],
    "rows": ["", [{"k": ["v"]}, {"k": ["w"]}]],
}


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({}, True),
        ({"city": "new york_NY"}, True),
        ({"city": "Boston"}, False),
        ({"city": 3}, False),
        ({"days": 3}, True),
        ({"days": 3.0}, False),
        ({"days": "3"}, False),
        ({"share": 2}, True),
        ({"share": 1}, False),
        ({"exact": True}, True),
        ({"exact": 1}, False),
        ({"names": ["a B", "C"]}, True),
        ({"names": ["c", "A b"]}, False),
        ({"names": ("A b", "c")}, False),
        ({"size": (1, 2)}, True),
        ({"how": {"unit": "c"}}, True),
        ({"how": {"unit": "F"}}, False),
        ({"how": {"day": 1}}, False),
        ({"how": {"unit": "C", "x": 1}}, False),
        ({"rows": [{"k": "V"}, {"k": "w"}]}, True),
        ({"rows": [{"k": "w"}, {"k": "v"}]}, False),
        ({"rows": [{"k": "v"}]}, False),
        ({"more": 1}, False),
    ],
)
def test_one_call_is_compared(given: dict[str, Any], right: bool) -> None:
    call = ("w_get", {"city": "NYC", **given})
    assert all_match([call], [{"w.get": ALLOWED}], [OTHER, FUNCTION]) is right


def test_functions_required_arguments_and_numbers_of_calls_are_compared() -> None:
    def right(calls: list[Any], truths: list[Any]) -> bool:
        return all_match(calls, truths, [FUNCTION, OTHER])

    first, second = {"w.get": {"city": ["a"]}}, {"w.get": {"city": ["b"], "days": [1, ""]}}
    assert right([("w.get", {"city": "b"}), ("w.get", {"city": "a"})], [first, second]), "in any order"
    assert not right([("w.get", {"city": "a"}), ("w.get", {"city": "a"})], [first, second])
    assert not right([("w.get", {"city": "a"})], [first, second]) and not right([("w.get", {"city": "a"})], [])
    assert not right([("other", {"city": "a"})], [first]) and right([("other", {})], [{"other": {}}])
    assert not right([("w.get", {})], [{"w.get": {"city": ["", "a"]}}]), "a required argument is missing"
    assert not right([("w.get", {"city": "a"})], [{"w.get": {"city": ["a"], "days": [1]}}]), "so is one of the answer"
    floats = [{"w.get": {"city": ["a"], "shares": [[1.0, 2.5]]}}]
    assert right([("w.get", {"city": "a", "shares": [1.0, 2.5]})], floats)
    assert not right([("w.get", {"city": "a", "shares": [1, 2.5]})], floats), "in a list 1 is no float"
    variable = {"w.get": {"city": ["a"], "days": ["user.days"]}}
    assert right([("w.get", {"city": "a", "days": "user.days"})], [variable]), "a variable is text of its own"
    assert not right([("w.get", {"city": "a", "days": 3})], [variable])
