"""The harness's tasks are found as its own index finds them, which takes most of a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.evaluate.registry import every_name, registered


@pytest.mark.parametrize(
    ("folder", "name"),
    [("arc", "ai2_arc"), ("mmlu", "mmlu"), ("mmlu", "mmlu_stem_tasks"), ("glue", "glue"), ("gsm8k", "gsm8k")],
)
def test_a_name_is_found_as_in_the_index_of_its_folder(folder: str, name: str) -> None:
    from lm_eval import tasks
    from lm_eval.tasks._index import TaskIndex

    assert registered(name) == TaskIndex.build([Path(tasks.__file__).parent / folder])[name]
    assert name in every_name()


def test_what_is_no_name_is_not_found() -> None:
    assert registered("mmlu_stem_task") is None
    assert registered("accuracy") is None
