"""ChatRAG-Bench: the last question of a conversation about documents that are given.

Reads the files of the data set nvidia/ChatRAG-Bench, its folder `data` as it is. Prompts and metrics are those of its
authors: F1 of words, and for ConvFinQA whether the answer holds the number or the formula. Their documents, in a plain
text after `System:`, stand here in the system message of the chat template.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ...errors import DataError
from ...events import Listener
from .judge import Judge
from .task import Answered, ChatTask, Graded, Message, Question, mean, means_by_group, read_records, the_file

__all__ = ["CHATRAG"]

FILES: Mapping[str, str] = {
    "doc2dial": "doc2dial/test.json*",
    "quac": "quac/test.json*",
    "qrecc": "qrecc/test.json*",
    "topiocqa": "topiocqa/dev.json*",
    "inscit": "inscit/dev.json*",
    "coqa": "coqa/dev.json*",
    "hybridial": "hybridial/test.json*",
    "doqa_cooking": "doqa/test_cooking.json*",
    "doqa_movies": "doqa/test_movies.json*",
    "doqa_travel": "doqa/test_travel.json*",
    "sqa": "sqa/test.json*",
    "convfinqa": "convfinqa/dev.json*",
}
"""Data set -> its file. The three of DoQA count as one in the score."""
SOURCE = "the folder data of nvidia/ChatRAG-Bench"
SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)
FULL = "Please give a full and complete answer for the question. "
"""Instruction before the first question; for the data sets that `ASKED` does not name."""
ASKED: Mapping[str, str] = {
    "topiocqa": "Answer the following question with a short span, or a full and complete answer. ",
    "sqa": "Answer the following question with one or a list of items. ",
    "coqa": "Answer the following question with a short span. The answer needs to be just in a few words. ",
}
"""Data set -> instruction before the last question."""
DOCUMENTS, TURNS = 5, 7
"""Largest numbers of documents and of messages in a prompt."""
NO_ANSWER = "Sorry. I cannot find the answer based on the context."
REFUSES = re.compile(
    r"(cannot|can't|can not|could not|couldn't) find|cannot (provide|answer|be found|be determined)"
    r"|(couldnot|can't|couldn't) answer|(does not|doesn't) (provide|mention|specify|include|contain|indicate|disclose)"
    r"|do(n't| not) have|don't know|not able to|unable to|no information|there is no|not (mentioned|provided)"
    r"|not explicitly (mentioned|explain)"
)
"""Phrases that count as NO_ANSWER in QuAC and DoQA, some of whose questions have none."""


class Context(TypedDict):
    title: NotRequired[str | None]
    text: str


class Record(TypedDict):
    messages: list[Message]
    ctxs: list[Context]
    answers: NotRequired[Any]
    answer: NotRequired[Any]
    exe_answer: NotRequired[float | int | str]


class ChatRag(ChatTask):
    """The task: the mean over ten data sets of the mean over their questions."""

    most_tokens = 64
    metrics = ("score", *FILES)

    def questions(self, folder: Path) -> list[Question]:
        """Return the questions of all data sets; see `ChatTask`."""
        return [each for name in FILES for each in _questions(folder, name)]

    def grade(
        self, answered: Sequence[Answered], folder: Path, judge: Judge | None, file: Path | None, listener: Listener
    ) -> Graded:
        """Grade answers; see `ChatTask`."""
        scores = [_score(each) for each in answered]
        lines = [
            {
                "id": each.question.id,
                "data_set": each.question.group,
                "messages": list(each.question.row["messages"]),
                "true_answers": _truths(each.question),
                "answer": each.answers[0],
                "score": score,
            }
            for each, score in zip(answered, scores, strict=True)
        ]
        means = means_by_group(answered, scores, FILES)
        return Graded({"score": _overall(means), **means}, lines)


def _overall(means: Mapping[str, float | None]) -> float | None:
    """Return the mean over data sets; those of DoQA count together as one."""
    sets: dict[str, list[float]] = {}
    for name, value in means.items():
        if value is not None:
            sets.setdefault(name.partition("_")[0], []).append(value)
    return mean([sum(found) / len(found) for found in sets.values()])


def _questions(folder: Path, name: str) -> list[Question]:
    path = the_file(folder, FILES[name], FILES[name].removesuffix("*"), SOURCE)
    records: list[Record] = read_records(path, Record)
    questions = []
    for number, record in enumerate(records, 1):
        messages = record["messages"][-TURNS:]
        if not messages or messages[-1]["role"] != "user":
            raise DataError(f"{path}, record {number} does not end with a question of the user. Correct its messages.")
        turn = (_system(record["ctxs"]), *_instructed(messages, name))
        row = {key: value for key, value in record.items() if key != "ctxs"}
        question = Question(f"{name}-{number}", name, (turn,), row)
        if not _truths(question) or (name == "convfinqa" and "exe_answer" not in record):
            raise DataError(f"{path}, record {number} has no true answer. Correct or remove it.")
        questions.append(question)
    return questions


def _system(documents: Sequence[Context]) -> Message:
    texts = [f"title: {each.get('title') or ''}, source: {each['text']}" for each in documents[:DOCUMENTS]]
    return {"role": "system", "content": "\n\n".join([SYSTEM, *texts])}


def _instructed(messages: Sequence[Message], name: str) -> list[Message]:
    """Return a conversation with the instruction of its data set."""
    last = len(messages) - 1
    at = last if name in ASKED else next(at for at, each in enumerate(messages) if each["role"] == "user")
    instructed: Message = {"role": "user", "content": ASKED.get(name, FULL) + messages[at]["content"]}
    return [*messages[:at], instructed, *messages[at + 1 :]]


def _truths(question: Question) -> list[str]:
    row = question.row
    given = row.get("answers") or row.get("answer")
    found = [str(each) for each in given] if isinstance(given, list) else [] if given is None else [str(given)]
    if question.group == "inscit":  # the authors added it to every question
        found = [each for each in found if each != NO_ANSWER]
    return [each for each in found if each.strip()]


def _score(answered: Answered) -> float:
    question, answer = answered.question, answered.answers[0]
    if question.group == "convfinqa":
        row = question.row
        return float(_holds_number(answer, row["exe_answer"], _truths(question)[0], row["messages"][-1]["content"]))
    if (question.group == "quac" or question.group.startswith("doqa")) and REFUSES.search(answer.lower()):
        answer = NO_ANSWER
    return max(_f1(answer, truth) for truth in _truths(question))


def _f1(answer: str, truth: str) -> float:
    """Return the F-measure of the words that two texts share."""
    words, right = _words(answer), _words(truth)
    same = sum((Counter(words) & Counter(right)).values())
    return 2 * same / (len(words) + len(right)) if same else 0.0


def _words(text: str) -> list[str]:
    """Return words in lower case, without punctuation and articles."""
    plain = re.sub(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']", " ", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _holds_number(answer: str, number: float | str, formula: str, question: str) -> bool:
    """Return whether an answer holds the true number, in one of the forms that the authors accept, or the formula."""
    said = re.sub(r"\((\b\w+\b)\)", "", re.sub(r"[,$]|million|billion", "", answer))
    said = " ".join(said.split())
    forms = [str(number), formula]
    try:
        value = float(number)
    except ValueError:
        return any(form in said for form in forms)
    forms += [str(round(value, 3)), str(round(value, 2))]
    if "percent" in question:
        forms += [str(value * 100), str(round(value * 100, 1)), str(round(value * 100, 2))]
    if str(number).endswith(".0"):
        forms.append(str(int(value)))
    if "decrease" in said and value < 0:
        forms.append(str(number).removeprefix("-"))
    return any(form in said for form in forms)


CHATRAG = ChatRag()
