"""MT-Bench: eighty conversations of two turns, each answer rated from 1 to 10 by a judge.

Reads the files that FastChat publishes (github.com/lm-sys/FastChat, fastchat/llm_judge/data): `question.jsonl` and
`reference_answer/` of mt_bench, and `judge_prompts.jsonl`, which holds the judge's instructions. Answers are written in
the form of FastChat's `model_answer`, so that its own scripts, or any other judge, can rate them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from ...errors import DataError
from ...events import Event, Listener
from ..local import Row, read_rows
from .judge import Judge, judgments
from .task import Answered, ChatTask, Graded, Message, Question, mean, read_records, the_file, write_lines

__all__ = ["MT_BENCH"]

SOURCE = "FastChat's llm_judge/data"
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a reference answer."""
TEMPERATURES: Mapping[str, float] = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's sampling temperature by category; the others are greedy."""
RATING = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))
LOWEST, HIGHEST = 1.0, 10.0
FIELDS = {"question", "answer", "question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"}
"""Fields that a judge's instructions may have."""


class QuestionRecord(TypedDict):
    question_id: int
    category: str
    turns: list[str]


class Choice(TypedDict):
    turns: list[str]


class AnswerRecord(TypedDict):
    question_id: int
    choices: list[Choice]


class Prompt(TypedDict):
    """Instructions of a judge."""

    name: str
    system_prompt: str
    prompt_template: str
    type: NotRequired[str]


class MtBench(ChatTask):
    """The task: the mean of the ratings of both turns, over all questions."""

    most_tokens = 1024
    metrics = ("rating", "turn_1", "turn_2")

    def questions(self, folder: Path) -> list[Question]:
        """Return the questions; see `ChatTask`."""
        path = the_file(folder, "question.jsonl", "question.jsonl", f"{SOURCE}/mt_bench")
        return [_question(record, str(path)) for record in read_records(path, QuestionRecord)]

    def check_judge(self, folder: Path) -> None:
        """Raise DataError or FileError if the judge's instructions or reference answers are missing or invalid."""
        prompts, references = _prompts(folder), _references(folder)
        for question in self.questions(folder):
            for turn in range(2):
                _conversation(Answered(question, ("", "")), turn, prompts, references)

    def grade(
        self, answered: Sequence[Answered], folder: Path, judge: Judge | None, file: Path | None, listener: Listener
    ) -> Graded:
        """Have a judge rate the answers; see `ChatTask`."""
        lines = [_line(each) for each in answered]
        if judge is None:
            note = f"mt_bench has no score, for no judge is set. {'Its answers are in ' + str(file) if file else ''}"
            return Graded(dict.fromkeys(self.metrics), lines, [note.strip()])
        _rate(lines, _asked(answered, folder), judge, file, listener)
        ratings = [[line["ratings"][turn] for line in lines] for turn in range(2)]  # type: ignore[index]
        known = [[rating for rating in turn if rating is not None] for turn in ratings]
        missing, every = sum(turn.count(None) for turn in ratings), 2 * len(lines)
        if missing == every:
            raise DataError(
                f"no response of the judge {judge.model} holds a rating such as [[5]]; the first one is "
                f"{str(lines[0]['judgments'][0])[:100]!r}. Name another model as judge."  # type: ignore[index]
            )
        note = f"mt_bench: {missing} of {every} responses of the judge hold no rating, and are left out of the mean."
        values = {"rating": mean(known[0] + known[1]), "turn_1": mean(known[0]), "turn_2": mean(known[1])}
        return Graded(values, lines, [note] if missing else [])


def _question(record: QuestionRecord, path: str) -> Question:
    if len(record["turns"]) != 2:
        raise DataError(f"{path}, question {record['question_id']} does not have two turns. Copy it from {SOURCE}.")
    turns = tuple((Message(role="user", content=turn),) for turn in record["turns"])
    temperature = TEMPERATURES.get(record["category"], 0.0)
    return Question(str(record["question_id"]), record["category"], turns, record, temperature=temperature)


def _prompts(folder: Path) -> Mapping[str, Prompt]:
    path = the_file(folder, "judge_prompts.jsonl", "judge_prompts.jsonl", SOURCE)
    prompts: dict[str, Prompt] = {each["name"]: each for each in read_records(path, Prompt)}
    needed = [f"single-{kind}v1{turn}" for kind in ("", "math-") for turn in ("", "-multi-turn")]
    if missing := [name for name in needed if name not in prompts]:
        raise DataError(f"{path} has no {missing[0]}. Copy it from {SOURCE}.")
    for name in needed:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(prompts[name]["prompt_template"])} - {None}
        except ValueError as error:
            raise DataError(f"{path}: {name} is not a template: {error}. Copy it from {SOURCE}.") from error
        if unknown := sorted(map(str, fields - FIELDS)):
            raise DataError(f"{path}: {name} has the field {unknown[0]}, which MT-Bench lacks. Copy it from {SOURCE}.")
    return prompts


def _references(folder: Path) -> Mapping[str, list[str]]:
    """Return question -> reference answer of each turn."""
    path = the_file(folder, "reference_answer/*.jsonl", "reference_answer/gpt-4.jsonl", f"{SOURCE}/mt_bench")
    records: list[AnswerRecord] = read_records(path, AnswerRecord)
    return {str(each["question_id"]): each["choices"][0]["turns"] for each in records if each["choices"]}


def _asked(answered: Sequence[Answered], folder: Path) -> list[tuple[int, int, list[dict[str, str]]]]:
    """Return (place of the question, turn, conversation with the judge) of each answer."""
    prompts, references = _prompts(folder), _references(folder)
    return [
        (at, turn, _conversation(each, turn, prompts, references))
        for at, each in enumerate(answered)
        for turn in range(2)
    ]


def _conversation(
    answered: Answered, turn: int, prompts: Mapping[str, Prompt], references: Mapping[str, list[str]]
) -> list[dict[str, str]]:
    """Return the conversation with the judge about the answer of one turn."""
    question, answers = answered.question, answered.answers
    (first,), (second,) = question.turns
    fields = {"question": first["content"], "answer": answers[0]}
    fields |= {"question_1": first["content"], "question_2": second["content"]}
    fields |= {"answer_1": answers[0], "answer_2": answers[1]}
    if with_reference := question.group in WITH_REFERENCE:
        reference = references.get(question.id, ())
        if len(reference) != 2:
            raise DataError(
                f"question {question.id} of MT-Bench has no reference answers for two turns, which the judge of "
                f"{question.group} needs. Copy reference_answer from {SOURCE}/mt_bench."
            )
        fields |= {"ref_answer_1": reference[0], "ref_answer_2": reference[1]}
    prompt = prompts[f"single-{'math-' if with_reference else ''}v1{'-multi-turn' if turn else ''}"]
    try:
        asked = prompt["prompt_template"].format(**fields)
    except (LookupError, ValueError) as error:
        raise DataError(f"{prompt['name']} of MT-Bench asks for {error}. Copy it from {SOURCE}.") from error
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": asked}]


def _line(answered: Answered) -> dict[str, object]:
    """Return a question and its answers in the form of FastChat's `model_answer`."""
    row = answered.question.row
    choices = [{"index": 0, "turns": list(answered.answers)}]
    return {"question_id": row["question_id"], "category": row["category"], "turns": row["turns"], "choices": choices}


def _rate(
    lines: Sequence[dict[str, object]],
    asked: Sequence[tuple[int, int, list[dict[str, str]]]],
    judge: Judge,
    file: Path | None,
    listener: Listener,
) -> None:
    """Add `judge`, `judgments` and `ratings` of both turns to each line.

    file: where the lines are written, also if the judge fails; responses that it already holds to the same conversation
    by the same model are not asked for again.
    """
    known = _known(file, judge)
    responses: list[list[str | None]] = [[None, None] for _ in lines]
    prompts = [[""] * 2 for _ in lines]
    for at, turn, conversation in asked:
        prompts[at][turn] = conversation[-1]["content"]
        responses[at][turn] = known.get(prompts[at][turn])
    rest = [(at, turn, conversation) for at, turn, conversation in asked if responses[at][turn] is None]

    def save() -> None:
        for line, said, sent in zip(lines, responses, prompts, strict=True):
            ratings = [None if each is None else _rating(each) for each in said]
            line |= {"judge": judge.model, "judge_prompts": sent, "judgments": said, "ratings": ratings}
        if file is not None:
            write_lines(file, lines)

    save()
    try:
        with closing(judgments(judge, [each for *_, each in rest])) as found:
            for done, (number, response) in enumerate(found, 1):
                at, turn, _ = rest[number]
                responses[at][turn] = response
                listener(Event("judge", done, len(rest), "ratings"))
    finally:
        save()


def _known(file: Path | None, judge: Judge) -> dict[str, str]:
    """Return prompt -> response of the judge in a file that an earlier run wrote; empty if it is of another judge."""
    if file is None or not file.is_file():
        return {}
    rows: list[Row] = [row for row in read_rows(file) if row.get("judge") == judge.model]
    pairs = [pair for row in rows for pair in zip(_list(row, "judge_prompts"), _list(row, "judgments"), strict=False)]
    return {prompt: response for prompt, response in pairs if isinstance(prompt, str) and isinstance(response, str)}


def _list(row: Row, key: str) -> list[object]:
    value = row.get(key)
    return value if isinstance(value, list) else []


def _rating(response: str) -> float | None:
    """Return the rating in a judge's response; None if it holds none from 1 to 10."""
    found = next((match for pattern in RATING if (match := pattern.search(response))), None)
    rating = float(found[1]) if found else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


MT_BENCH = MtBench()
