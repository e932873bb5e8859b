"""Task suites of the papers, with their shots, metrics and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from ..score import DEPTH_METRICS, DepthMetric, leave_out
from ..settings import Count, Field, NotNegative, Settings, Steps, Text

__all__ = ["SUITES", "Task"]


class Task(Settings):
    """One task of lm-evaluation-harness, or `xlsum_english`, `bfcl_v2_live`, `mt_bench` or `chatrag`."""

    name: Text
    """Name in the harness. A group or a tag stands for all of its tasks."""
    shots: Steps | None = None
    """Few-shot examples. Default: the task's own number."""
    metric: str | tuple[str, ...] | None = None
    """Metric shown in tables, or a list of metrics whose mean is shown. Default: the task's first."""
    answers: Count = 1
    """Answers sampled per question, in generation tasks."""
    temperature: NotNegative | None = None
    """Sampling temperature; 0 is greedy decoding. Default: the task's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens that together have this probability."""


IFEVAL = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")

SUITES: Mapping[str, tuple[Task, ...]] = {
    "base": (
        Task("mmlu", 5, "acc"),
        Task("winogrande", 5, "acc"),
        Task("arc_challenge", 25, "acc_norm"),
        Task("hellaswag", 10, "acc_norm"),
        Task("gsm8k", 5, "exact_match"),
        Task("truthfulqa_mc2", 0, "acc"),
        Task("xlsum_english", 3, "rouge_l"),
        Task("mbpp", 0, "pass_at_1", temperature=0.2, top_p=0.95),
        Task("humaneval", 0, "pass_at_1", answers=20, temperature=0.2, top_p=0.95),
    ),
    "instruct": (
        Task("mmlu", 5, "acc"),
        Task("gsm8k", 0, "exact_match,flexible-extract"),
        Task("gpqa_main_zeroshot", 0, "acc_norm"),
        Task("ifeval", 0, IFEVAL),
        Task("mbpp_instruct", 0, "pass_at_1"),
        Task("humaneval_instruct", 0, "pass_at_1"),
        Task("bfcl_v2_live", 0, "accuracy"),
        Task("mt_bench", 0, "rating", temperature=0.0),
        Task("chatrag", 0, "score"),
    ),
}
"""The tasks of both papers. For XL-Sum they state three shots in one place and none in another, and use a fifth of it.
Their aligned models answer greedily and without examples, but for MMLU. Without examples no model knows that GSM8K's
answers follow `####`: the last number of an answer counts there."""

DEPTH_METRICS["winogrande"] = DepthMetric(leave_out, task=Task("winogrande", 5, "acc"))  # the second paper's
