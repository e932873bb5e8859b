"""Make the data of the alignment example from the names of the standard library, and rate answers to it.

    python examples/align/tasks.py OUT

writes `chats.jsonl` (demonstrations, of which a third are wrong), `prompts.jsonl` (the same prompts, without answers),
`held_out.jsonl` (a fifth of all prompts, which are in no other file), and `teacher/`, the quickstart's teacher with a
chat template. As a plugin of a recipe, this module adds the reward `follows`: 1 where an answer does what the prompt
asks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from minitron_megatron.align import REWARDS, Record, Reward

FORMS = {"import": "import {}", "call": "{}()", "quote": "'{}'", "from": "from {} import *"}
"""Instruction -> form of the answer."""
WRONG = 1 / 3
"""Share of the demonstrations whose form is drawn at random."""
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}>>> {{ message.content }}\n{% else %}"
    "{{ message.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
"""Chat template. An answer begins on the line after its prompt."""
TEACHER = Path(__file__).parents[1] / "quickstart" / "teacher"


def follows(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
    """Return 1 for each response that is exactly what its prompt asks for, else 0."""
    return [float(each.strip() == record["wanted"]) for record, each in zip(records, responses, strict=True)]


REWARDS["follows"] = Reward(follows, needs={"wanted": (str,)})


def names() -> list[str]:
    """Return the short names of the standard library's modules."""
    return sorted(name for name in sys.stdlib_module_names if "_" not in name and len(name) < 9)


def write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(out: Path) -> None:
    """Write all files."""
    draw = random.Random(0)
    asked = [(name, instruction) for name in names() for instruction in FORMS]
    draw.shuffle(asked)
    out.mkdir(parents=True, exist_ok=True)
    prompts, chats = [], []
    for name, instruction in asked:
        prompt, right = f"{instruction} {name}", FORMS[instruction]
        shown = draw.choice(list(FORMS.values())) if draw.random() < WRONG else right
        prompts.append({"prompt": prompt, "wanted": right.format(name)})
        chats.append({"prompt": prompt, "response": shown.format(name)})
    first = len(asked) // 5
    write(out / "held_out.jsonl", prompts[:first])
    write(out / "prompts.jsonl", prompts[first:])
    write(out / "chats.jsonl", chats[first:])
    shutil.copytree(TEACHER, out / "teacher", dirs_exist_ok=True)
    (out / "teacher" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
