"""Tiny files of BFCL v2 live, MT-Bench and ChatRAG-Bench in the forms that their authors publish."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitron_megatron.evaluate.chat.bfcl import CALLED, CATEGORIES
from minitron_megatron.evaluate.chat.chatrag import FILES, NO_ANSWER

__all__ = ["bfcl", "chatrag", "mt_bench", "write"]

WEATHER = {
    "name": "weather.get",
    "description": "Weather of a city.",
    "parameters": {
        "type": "dict",
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "Name"},
            "share": {"type": "float", "description": "Of it."},
            "box": {"type": "tuple", "items": {"type": "float"}},
        },
    },
}


def write(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bfcl(root: Path) -> None:
    """Write two questions of each category; their true calls stand in a folder of their own, as BFCL has it."""
    folder = root / "bfcl_v2_live"
    for category in CATEGORIES:
        ids = [f"{category}_{number}-0-0" for number in range(2)]
        question = [[{"role": "user", "content": "Rain in Rome?"}]]
        rows = [{"id": name, "question": question, "function": [WEATHER]} for name in ids]
        write(folder / f"BFCL_v3_{category}.json", rows)
        if category in CALLED:
            truths = [{"weather.get": {"city": ["Rome"], "share": [0.5, ""], "box": [""]}}] * (
                1 + ("parallel" in category)
            )
            answers = [{"id": name, "ground_truth": truths} for name in reversed(ids)]
            write(folder / "possible_answer" / f"BFCL_v3_{category}.json", answers)


def mt_bench(root: Path) -> None:
    """Write a question of writing and one of maths, with short instructions of a judge."""
    folder = root / "mt_bench"
    rows = [
        {"question_id": number, "category": category, "turns": [f"Write {at}.", f"Again {at}."]}
        for at, (number, category) in enumerate([(81, "writing"), (111, "math")])
    ]
    write(folder / "question.jsonl", rows)
    reference = {"question_id": 111, "choices": [{"index": 0, "turns": ["r1", "r2"]}]}
    write(folder / "reference_answer" / "gpt-4.jsonl", [reference])
    prompts = {
        "single-v1": "plain {question} | {answer}",
        "single-v1-multi-turn": "plain two: {question_1} | {answer_1} | {question_2} | {answer_2}",
        "single-math-v1": "math {question} | {ref_answer_1} | {answer}",
        "single-math-v1-multi-turn": (
            "math two: {question_1} | {ref_answer_1} | {answer_1} | {question_2} | {ref_answer_2} | {answer_2}"
        ),
        "pair-v2": "{answer_a}",
    }
    write(
        folder / "judge_prompts.jsonl",
        [{"name": name, "system_prompt": "You rate.", "prompt_template": text} for name, text in prompts.items()],
    )


def chatrag(root: Path) -> None:
    """Write a question for each data set, as a JSON array."""
    for name, file in FILES.items():
        record: dict[str, Any] = {
            "messages": [
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "Ann."},
                {"role": "user", "content": "What percent?"},
            ],
            "ctxs": [{"title": "T", "text": f"text {number}"} for number in range(6)],
            "answers": ["the red fox", NO_ANSWER],
        }
        if name == "convfinqa":
            record |= {"answers": ["0.1 + 0.02"], "exe_answer": 0.1234}
        path = root / "chatrag" / file.removesuffix("*")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([record]))
