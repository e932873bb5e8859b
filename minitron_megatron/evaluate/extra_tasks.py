"""Tasks that the harness lacks or cannot run without a download: English XL-Sum, and programming tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .programs import share_that_pass
from .registry import HarnessConfig

__all__ = ["EXTRA_TASKS", "PROGRAMS", "graded"]

Doc = Mapping[str, str]
"""Fields of a question."""


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Return ROUGE-L: the F-measure of the longest common subsequence of word stems."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(references[0], predictions[0].strip())["rougeL"].fmeasure)


EXTRA_TASKS: Mapping[str, HarnessConfig] = {
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
"""Task name -> configuration in the harness's form. The prompt is ours: the papers do not print XL-Sum's."""


def _in_fence(answer: str) -> str:
    """Return the code of an answer whose prompt already opened the code block."""
    return answer.removeprefix("```python").removeprefix("```").split("```")[0]


PROGRAMS: Mapping[str, Callable[[Doc, str], str]] = {
    "humaneval": lambda doc, answer: doc["prompt"] + answer,
    "humaneval_instruct": lambda doc, answer: doc["prompt"] + _in_fence(answer),
    "mbpp": lambda doc, answer: answer,
    "mbpp_instruct": lambda doc, answer: _in_fence(answer.lstrip()),
}
"""Task whose answers are programs -> function (question, answer) -> program to run."""


def graded(name: str, config: HarnessConfig, run: bool) -> HarnessConfig:
    """Return a task of PROGRAMS with our own grading; the harness would download its own.

    run: run the programs; if false, none runs and every answer counts as failed.
    """

    def build(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
        return [[PROGRAMS[name](doc, each) for each in samples] for samples, doc in zip(answers, docs, strict=True)]

    def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
        return share_that_pass(predictions[0], references[0]) if run else 0.0

    others = {key: value for key, value in config.items() if key != "fewshot_config"}
    metric = {"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}
    filters = [{"name": "program", "filter": [{"function": "custom", "filter_fn": build}]}]
    return others | {"num_fewshot": 0, "metric_list": [metric], "filter_list": filters, "unsafe_code": True}
