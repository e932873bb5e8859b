"""BFCL v2 live: function calls that users asked for, compared with the true ones by their abstract syntax.

Reads the files that BFCL publishes (github.com/ShishirPatil/gorilla) since v3, which hold v2's live questions:
`*_live_simple.json` and so on, with the true calls in `possible_answer/`, or in the same record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ...errors import DataError
from ...events import Listener
from ...files import check_as
from .calls import calls_in
from .judge import Judge
from .match import LISTS, TYPES, all_match, plain_name
from .task import Answered, ChatTask, Graded, Message, Question, mean, means_by_group, read_records, the_file

__all__ = ["BFCL"]

CALLED = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
"""Categories whose questions have true calls."""
CATEGORIES = (*CALLED, "live_irrelevance", "live_relevance")
SOURCE = "BFCL's data folder"
JSON_TYPES: Mapping[str, str] = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's type -> JSON Schema's, where they differ."""
FLOAT_HINT = " This is a float type value."
"""Added to the description of a float, for JSON Schema has numbers alone; as BFCL does."""

TrueCalls = list[dict[str, dict[str, list[object]]]]
"""Function -> argument -> allowed values, of each call."""
Truths = dict[str, TrueCalls]
"""Question -> its true calls."""


class Parameter(TypedDict):
    type: str
    items: NotRequired[dict[str, object]]


class Parameters(TypedDict):
    """Parts of a function's parameters that the comparison reads; templates get all of them."""

    required: NotRequired[list[str]]
    properties: dict[str, Parameter]


class FunctionRecord(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: dict[str, object]


class QuestionRecord(TypedDict):
    id: str
    question: list[list[Message]]
    function: list[FunctionRecord]
    ground_truth: NotRequired[TrueCalls]


class AnswerRecord(TypedDict):
    id: str
    ground_truth: TrueCalls


class Bfcl(ChatTask):
    """The task: the share of questions of all six categories that are answered right, as in BFCL v2."""

    most_tokens = 512
    metrics = ("accuracy", *CATEGORIES)

    def questions(self, folder: Path) -> list[Question]:
        """Return the questions of all categories; see `ChatTask`."""
        return [each for category in CATEGORIES for each in _category(folder, category)]

    def grade(
        self, answered: Sequence[Answered], folder: Path, judge: Judge | None, file: Path | None, listener: Listener
    ) -> Graded:
        """Grade answers; see `ChatTask`."""
        right = [_is_right(each) for each in answered]
        lines = [
            {"id": each.question.id, "category": each.question.group, "answer": each.answers[0], "right": fits}
            for each, fits in zip(answered, right, strict=True)
        ]
        scores = [float(fits) for fits in right]
        return Graded({"accuracy": mean(scores), **means_by_group(answered, scores, CATEGORIES)}, lines)


def _is_right(answered: Answered) -> bool:
    question, calls = answered.question, calls_in(answered.answers[0])
    if question.group == "live_irrelevance":
        return not calls
    if question.group == "live_relevance":
        return bool(calls)
    return calls is not None and all_match(calls, question.row["ground_truth"], question.row["function"])


def _category(folder: Path, category: str) -> list[Question]:
    path = the_file(folder, f"*{category}.json*", f"file of {category}, such as BFCL_v3_{category}.json", SOURCE)
    records: list[QuestionRecord] = read_records(path, QuestionRecord)
    truths: Truths = {each["id"]: each["ground_truth"] for each in records if "ground_truth" in each}
    if category in CALLED and not truths:
        found = the_file(folder, f"possible_answer/*{category}.json*", f"possible_answer/{path.name}", SOURCE)
        truths = {each["id"]: each["ground_truth"] for each in read_records(found, AnswerRecord)}
    return [_question(record, category, truths, f"{path}, question {record['id']}") for record in records]


def _question(record: QuestionRecord, category: str, truths: Truths, place: str) -> Question:
    if len(record["question"]) != 1:
        raise DataError(f"{place} has {len(record['question'])} turns, but live questions have one. Correct it.")
    functions = {each["name"]: each for each in record["function"]}
    for function in functions.values():
        _check_function(function, place)
    if category in CALLED:
        truth = truths.get(record["id"])
        if not truth or not all(len(each) == 1 and next(iter(each)) in functions for each in truth):
            raise DataError(f"{place} has no true calls of its functions. Correct its ground_truth.")
        record = {**record, "ground_truth": truth}
    tools = [_tool(each) for each in record["function"]]
    return Question(record["id"], category, (_merged(record["question"][0]),), record, tools)


def _merged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages with those of the user that follow each other as one: many templates want them to alternate."""
    merged: list[Message] = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] == "user":
            merged[-1] = {"role": "user", "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return tuple(merged)


def _check_function(function: FunctionRecord, place: str) -> None:
    parameters: Parameters = check_as(function["parameters"], Parameters, f"{place}, {function['name']}")
    for name, parameter in parameters["properties"].items():
        inner = parameter.get("items", {}).get("type") if parameter["type"] in LISTS else "any"
        if parameter["type"] not in TYPES or inner not in TYPES:
            raise DataError(
                f"{place}: the parameter {name} of {function['name']} has no type that BFCL compares. "
                f"It has {', '.join(TYPES)}, and lists say the type of their items."
            )


def _tool(function: FunctionRecord) -> dict[str, object]:
    """Return a function's JSON Schema in the form that chat templates take."""
    described = {**function, "name": plain_name(function["name"]), "parameters": _schema(function["parameters"])}
    return {"type": "function", "function": described}


def _schema(parameter: Mapping[str, Any]) -> dict[str, object]:
    found = dict(parameter)
    kind = parameter.get("type", "string")
    found["type"] = JSON_TYPES.get(kind, kind)
    if kind == "float" and "description" in parameter:
        found |= {"format": "float", "description": f"{parameter['description']}{FLOAT_HINT}"}
    if isinstance(parameter.get("properties"), dict):
        found["properties"] = {name: _schema(each) for name, each in parameter["properties"].items()}
    if isinstance(parameter.get("items"), dict):
        found["items"] = _schema(parameter["items"])
    return found


BFCL = Bfcl()
