"""Checks and runs conversation tasks, with results in the harness's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from ...errors import DataError, RecipeError, did_you_mean
from ...events import Listener, silent
from ...parallel import broadcast_object, fail_together
from ..harness import HarnessMethods
from ..suites import Task
from .bfcl import BFCL
from .chatrag import CHATRAG
from .judge import Judge
from .mt_bench import MT_BENCH
from .task import Answered, ChatTask, Graded, Message, Question, write_lines

__all__ = ["CHAT_TASKS", "NEED_JUDGE", "ChatResults", "check_chat_task", "run_chat_task"]

CHAT_TASKS: Mapping[str, ChatTask] = {"bfcl_v2_live": BFCL, "mt_bench": MT_BENCH, "chatrag": CHATRAG}
NEED_JUDGE = ("mt_bench",)
"""Tasks that have no score without a judge."""
CHECKED = 16
"""Number of longest questions whose prompts are checked before a task runs."""


class ChatResults(TypedDict):
    """Results of a task under the harness's keys."""

    results: dict[str, float | str | None]
    higher_is_better: dict[str, bool]
    samples: dict[str, int]
    """Numbers of questions: `original` in the files, `effective` asked."""
    notes: list[str]
    """Warnings for the user."""


def check_chat_task(task: Task, files: Path | None, lm: HarnessMethods | None, judge: Judge | None) -> None:
    """Check a task without running it.

    lm: without weights; None: check no prompts. Raises RecipeError for settings that the task does not have, DataError
    or FileError for missing or invalid files, and for prompts that the model or its template cannot take.
    """
    chat = CHAT_TASKS[task.name]
    if task.shots or task.answers > 1:
        raise RecipeError(f"task {task.name} has no examples and one answer a question. Remove its shots and answers.")
    for metric in (task.metric,) if isinstance(task.metric, str) else task.metric or ():
        if metric not in chat.metrics:
            raise RecipeError(
                f"task {task.name} has no metric {metric}.{did_you_mean(metric, chat.metrics)} "
                f"It has {', '.join(chat.metrics)}."
            )
    folder = _folder(task, files)
    questions = chat.questions(folder)
    if judge is not None:
        chat.check_judge(folder)
    if lm is not None:
        checked = _samples(questions)
        for each in checked:
            later = len(each.turns) - 1
            room = {"max_gen_toks": chat.most_tokens * (later + 1)}  # answers of all turns fit the context
            lm.check_conversations([_prompt(lm, each, ["."] * later)], _sampling(task, chat, 0.0) | room)
        _check_tools(task, lm, checked)


def _samples(questions: Sequence[Question]) -> list[Question]:
    """Return the longest questions, and one with each order of roles: a template may refuse some."""
    by_roles = {tuple(message["role"] for message in question.turns[0]): question for question in questions}
    longest = sorted(questions, key=lambda question: -len(str(question.turns) + str(question.tools)))
    return [*longest[:CHECKED], *by_roles.values()]


def _folder(task: Task, files: Path | None) -> Path:
    if files is None:
        raise RecipeError(
            f"task {task.name} reads local files alone. Set `task_files` to a folder that has {task.name}, or leave "
            "the task out: list in `tasks` those that you want."
        )
    if not (files / task.name).is_dir():
        raise DataError(f"{files / task.name} is not a folder. Put the files of the task {task.name} there.")
    return files / task.name


def _check_tools(task: Task, lm: HarnessMethods, questions: Sequence[Question]) -> None:
    """Raise RecipeError if the template leaves out the functions that a question offers."""
    for question in (each for each in questions if each.tools):
        (messages, *_) = question.turns
        if lm.conversation(messages, question.tools) == lm.conversation(messages):
            raise RecipeError(
                f"the chat template in {lm.tokenizer.name_or_path} ignores tools, so that the functions of task "
                f"{task.name} would not reach the model. Give a template with tools, or leave the task out."
            )


def run_chat_task(
    lm: HarnessMethods,
    task: Task,
    files: Path | None,
    *,
    limit: int | None = None,
    judge: Judge | None = None,
    answers: Path | None = None,
    listener: Listener = silent,
) -> ChatResults:
    """Run a task and return its results on every rank. Collective over the world.

    limit: number of questions, taken from all categories in turn. judge: rates answers that have no true ones, asked by
    the first rank. answers: file for the answers and their grades, written by the first rank; None: no file.
    """
    chat, folder = CHAT_TASKS[task.name], _folder(task, files)
    every = chat.questions(folder)
    answered = _answered(lm, task, chat, _first(every, limit))
    graded: Graded | None = None
    with fail_together():
        if lm.predictor.topology.rank == 0:
            graded = chat.grade(answered, folder, judge, answers, listener)
            if answers is not None:
                write_lines(answers, graded.lines)
    graded = broadcast_object(graded)
    assert graded is not None
    return {
        "results": {"alias": task.name, **{f"{name},none": value for name, value in graded.metrics.items()}},
        "higher_is_better": dict.fromkeys(graded.metrics, True),
        "samples": {"original": len(every), "effective": len(answered)},
        "notes": list(graded.notes),
    }


def _first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the first questions, taken from each group in turn."""
    seen: dict[str, int] = {}
    places = []
    for question in questions:
        places.append(seen.setdefault(question.group, 0))
        seen[question.group] += 1
    kept = set(sorted(range(len(questions)), key=lambda at: (places[at], at))[:limit])
    return [question for at, question in enumerate(questions) if at in kept]


def _answered(lm: HarnessMethods, task: Task, chat: ChatTask, questions: Sequence[Question]) -> list[Answered]:
    """Return the questions with the model's answers, turn by turn; questions of one temperature together."""
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        groups: dict[float, list[int]] = {}
        for at, question in enumerate(questions):
            if turn < len(question.turns):
                groups.setdefault(question.temperature, []).append(at)
        for temperature, places in groups.items():
            prompts = [_prompt(lm, questions[at], answers[at]) for at in places]
            for at, text in zip(places, lm.replies(prompts, _sampling(task, chat, temperature)), strict=True):
                answers[at].append(text.strip())
    return [Answered(question, tuple(found)) for question, found in zip(questions, answers, strict=True)]


def _prompt(lm: HarnessMethods, question: Question, answers: Sequence[str]) -> str:
    """Return the prompt of the turn after `answers`."""
    messages: list[Message] = list(question.turns[0])
    for answer, turn in zip(answers, question.turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, *turn]
    return lm.conversation(messages, question.tools)


def _sampling(task: Task, chat: ChatTask, temperature: float) -> dict[str, object]:
    """Return `generation_kwargs` for a question. temperature: the authors', if the task sets none."""
    chosen = temperature if task.temperature is None else task.temperature
    sampling = {"temperature": chosen, "top_p": task.top_p} if chosen else {}
    return {"until": [], "max_gen_toks": chat.most_tokens, "do_sample": chosen > 0, **sampling}
