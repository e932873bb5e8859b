"""The papers' tasks, with their shots, metrics and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SUITES", "Task"]


@dataclass(frozen=True)
class Task:
    """One task of the harness, or of `own`."""

    name: str
    shots: int | None = None
    """Solved examples before each question; None: as the task has it."""
    metric: str | tuple[str, ...] | None = None
    """The one that stands in tables, or of several the mean; None: the task's first."""
    answers: int = 1
    """Sampled for each question that is answered by generation."""
    temperature: float | None = None
    """None: as the task has it, which is greedy in these suites."""
    top_p: float = 1.0


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
        Task("gsm8k", 0, "exact_match"),
        Task("gpqa_main_zeroshot", 0, "acc_norm"),
        Task("ifeval", 0, IFEVAL),
        Task("mbpp_instruct", 0, "pass_at_1"),
        Task("humaneval_instruct", 0, "pass_at_1"),
    ),
}
"""As in both papers; of XL-Sum they say three shots in one place and none in another, and use a fifth of it. What they
also report is judged by another model (MT-Bench) or needs a service (BFCL): not here."""
