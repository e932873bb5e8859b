"""Function calls in a model's answer, read as syntax: nothing of the answer ever runs."""

from __future__ import annotations

import ast
import json
import operator
import re
import warnings

__all__ = ["Call", "calls_in"]

Call = tuple[str, dict[str, object]]
"""Function and its named arguments."""

TAGGED = re.compile(r"<(tool_?calls?)>(.*?)(?:</\1>|\Z)", re.IGNORECASE | re.DOTALL)
"""Tags around a call, or a list of calls, in the formats of Qwen, Hermes and Nemotron."""
MARKS = re.compile(r"\A\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)")
"""Token before a call in the formats of Mistral and Llama; most tokenizers drop it from an answer."""
ARGUMENTS = ("arguments", "parameters")
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calls_in(answer: str) -> list[Call] | None:
    """Return the calls of an answer; None if it is not in the form of calls.

    Calls are JSON, `{"name": ..., "arguments": {...}}`, alone, in a list, or in the tags of a chat template; or a
    Python list, `[f(a=1), g(b="x")]`, whose brackets may be missing. Without tags the answer holds nothing else.
    """
    tagged = [text for _, text in TAGGED.findall(answer)]
    calls: list[Call] = []
    for text in tagged or [MARKS.sub("", answer)]:
        found = _calls(text.strip())
        if found is None:
            return None
        calls += found
    return calls


def _calls(text: str) -> list[Call] | None:
    try:
        return _json_calls(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python about the syntax
            return _python_calls(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, ArithmeticError):
        return None


def _json_calls(text: str) -> list[Call]:
    """Return calls in JSON values that follow each other, apart from spaces, commas and semicolons."""
    decoder, at, values = json.JSONDecoder(), 0, list[object]()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        while at < len(text) and text[at] in " \n\r\t;,":
            at += 1
    if not text:
        raise ValueError("no text")
    return [_json_call(value) for value in values]


def _json_call(value: object) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("not a call")
    given: object = next((value[key] for key in ARGUMENTS if key in value), {})
    arguments = json.loads(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise ValueError("the arguments have no names")
    return value["name"], arguments


def _python_calls(text: str) -> list[Call]:
    text = text.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    body = ast.parse(text if text.endswith("]") else f"{text}]", mode="eval").body
    if not isinstance(body, ast.List | ast.Tuple):
        raise ValueError("not a list")
    return [_python_call(each) for each in body.elts]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    name, parts = node.func, list[str]()
    while isinstance(name, ast.Attribute):
        parts.append(name.attr)
        name = name.value
    if not isinstance(name, ast.Name) or any(each.arg is None for each in node.keywords):
        raise ValueError("not a call by name")
    arguments = {str(each.arg): _value(each.value) for each in node.keywords}
    return ".".join(reversed([*parts, name.id])), arguments


def _value(node: ast.expr) -> object:
    """Return the value of a literal; of anything else its text, as for a variable."""
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else node.value
        case ast.List():
            return [_value(each) for each in node.elts]
        case ast.Tuple():
            return tuple(_value(each) for each in node.elts)
        case ast.Dict() if None not in node.keys:
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        case ast.UnaryOp(op=ast.USub()) | ast.BinOp():
            return _number(node)
    return ast.unparse(node)


def _number(node: ast.expr) -> object:
    """Return the value of arithmetic on numbers; of other operations their text."""
    if isinstance(node, ast.UnaryOp):
        inside = _value(node.operand)
        return -inside if _is_number(inside) else ast.unparse(node)  # type: ignore[operator]
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    compute = ARITHMETIC.get(type(node.op))
    return compute(left, right) if compute and _is_number(left) and _is_number(right) else ast.unparse(node)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
