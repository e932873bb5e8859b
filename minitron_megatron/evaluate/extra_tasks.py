"""Tasks that the harness lacks, or that would not run in it without a download: English XL-Sum, and programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .programs import share_that_pass

__all__ = ["EXTRA_TASKS", "PROGRAMS", "graded"]

Doc = Mapping[str, Any]


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, of stems."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(references[0], predictions[0].strip())["rougeL"].fmeasure)


EXTRA_TASKS: Mapping[str, Mapping[str, Any]] = {
    "xlsum_english": {
        "task": "xlsum_english",
        "dataset_path": "csebuetnlp/xlsum",
        "dataset_name": "english",
        "output_type": "generate_until",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "test_split": "test",
        "doc_to_text": "Summarize this document:\n{{text}}\nSummary:",
        "doc_to_target": "{{summary}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 128},
        "metric_list": [{"metric": rouge_l, "aggregation": "mean", "higher_is_better": True}],
    }
}
"""Name -> its configuration in the harness's form. The papers do not print XL-Sum's prompt."""


def _in_fence(answer: str) -> str:
    """The code of an answer whose prompt has opened its block."""
    return answer.removeprefix("```python").removeprefix("```").split("```")[0]


PROGRAMS: Mapping[str, Callable[[Doc, str], str]] = {
    "humaneval": lambda doc, answer: doc["prompt"] + answer,
    "humaneval_instruct": lambda doc, answer: doc["prompt"] + _in_fence(answer),
    "mbpp": lambda doc, answer: answer,
    "mbpp_instruct": lambda doc, answer: _in_fence(answer.lstrip()),
}
"""Task whose answers are run -> the program that a question's answer makes."""


def graded(name: str, config: dict[str, Any], run: bool) -> dict[str, Any]:
    """A task of PROGRAMS with our own grading, for the harness downloads its. run: else nothing runs and all fails."""

    def build(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
        return [[PROGRAMS[name](doc, each) for each in of_doc] for of_doc, doc in zip(answers, docs, strict=True)]

    def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
        return share_that_pass(predictions[0], references[0]) if run else 0.0

    config = {key: value for key, value in config.items() if key != "fewshot_config"} | {"num_fewshot": 0}
    metric = {"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}
    filters = [{"name": "program", "filter": [{"function": "custom", "filter_fn": build}]}]
    return config | {"metric_list": [metric], "filter_list": filters, "unsafe_code": True}
