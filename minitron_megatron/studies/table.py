"""Results of a study: values per arm and seed, their differences from the first arm, costs, and the paper's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from statistics import mean
from typing import Any

from ..errors import CheckpointError, RecipeError
from ..forecast import count, with_model_folders
from ..records import Row, read_summary
from ..report import ArmResult, Compared, Ranks, StudyTable, Verdict, read_metrics
from ..run import results
from ..run_folder import RunFolder
from ..search import rank_correlation
from .jobs import LAST, Job, Plan
from .study import Arm, Measure

__all__ = ["collect", "is_done", "sign_test"]

RANDOM = "random init"
TRAINED_BY = {"distilled": "distill", RANDOM: "baseline"}
"""Row of the summary -> the stage that trained it; no other model is trained."""
BEFORE = ("correct", "score", "search", "prune")
"""Stages that a student's cost includes besides its own training; a random one's, only the teacher's correction."""


def is_done(job: Job) -> bool:
    """Return whether a run has ended, by the fingerprints of its stages."""
    try:
        for run in job.runs:
            results(with_model_folders(run.recipe), run.until or LAST)
    except (CheckpointError, RecipeError):  # a model of the family is not made yet
        return False
    return True


def collect(plan: Plan) -> StudyTable:
    """Return the results of a study whose runs are all done. Raises RecipeError if a measure is missing in one."""
    study = plan.study
    found = {name: _values(plan, name, arm) for name, arm in study.arms.items()}
    arms = [_arm(plan, name, found) for name in study.arms]
    first = plan.jobs[0].runs[0].recipe
    table: StudyTable = {
        "study": plan.name,
        "title": study.title,
        "claim": study.claim,
        "paper": study.paper,
        "model": str(first.model),
        "model_hash": results(with_model_folders(first), "prepare")["prepare"]["model_hash"],
        "seeds": plan.seeds,
        "measures": {name: measure.about for name, measure in study.measures.items()},
        "arms": arms,
        "verdicts": [verdict for name in study.measures if (verdict := _verdict(plan, name, found))],
        "flips": list(_flips(arms, list(study.measures))),
    }
    if study.ranks:
        table["ranks"] = _ranks(arms, next(iter(study.measures)))
    return table


def _jobs(plan: Plan, arm: str) -> list[Job]:
    return [job for job in plan.jobs if job.arm == arm]


def _values(plan: Plan, name: str, arm: Arm) -> dict[str, list[float | None]]:
    """Return measure -> value of each seed."""
    rows = [
        {row["model"]: row for row in read_summary(RunFolder(job.measured.out).summary)} for job in _jobs(plan, name)
    ]
    return {key: [_value(each, measure, arm, name) for each in rows] for key, measure in plan.study.measures.items()}


def _row_name(measure: Measure, arm: Arm) -> str | None:
    return arm.models.get(measure.model, measure.model)


def _value(rows: Mapping[str, Row], measure: Measure, arm: Arm, name: str) -> float | None:
    model = _row_name(measure, arm)
    if model is None:
        return None
    row: Mapping[str, Any] = rows.get(model) or {}
    sources = {f"loss of source {n}": loss for n, loss in enumerate((row.get("loss_by_source") or {}).values(), 1)}
    columns = {**row, **(row.get("tasks") or {}), **sources}
    value = columns.get(measure.column)
    if not isinstance(value, int | float):
        raise RecipeError(
            f"arm {name!r} has no {measure.column} of the model {model!r}: its summary has {', '.join(rows)}. Correct "
            "the study's measures."
        )
    return float(value)


def _arm(plan: Plan, name: str, found: Mapping[str, Mapping[str, list[float | None]]]) -> ArmResult:
    arm, jobs, study = plan.study.arms[name], _jobs(plan, name), plan.study
    recipe, first = jobs[0].measured, next(iter(study.arms))
    model = _row_name(list(study.measures.values())[-1], arm)
    rows, stage = read_summary(RunFolder(recipe.out).summary), TRAINED_BY.get(model or "")
    before = BEFORE if model != RANDOM else BEFORE[:1] if recipe.distill.has_teacher else ()
    tokens = flops = taught = 0
    for run, made in jobs[0].executions(set()):
        cost, last = count(run.planned, gpus=1), run.recipe == recipe
        stages = {*made} & {*before, stage} if last else {*made} & {*BEFORE, "distill"}
        tokens += cost.correct_tokens * ("correct" in stages) + cost.distill_tokens * bool(stages & {"distill", stage})
        flops += sum(cost.stage_flops[each] for each in stages)
        taught += cost.teacher_flops * bool(stages & {"distill", stage})
    return {
        "arm": name,
        "parameters": next((row.get("parameters") for row in rows if row["model"] == model), None),
        "tokens": tokens,
        "flops": flops,
        "teacher_flops": taught,
        "measures": {
            key: _compared(values, found[first][key], study.measures[key].better, arm.printed.get(key), name == first)
            for key, values in found[name].items()
        },
        "curve": _curve(jobs, stage),
    }


def _compared(
    values: Sequence[float | None], base: Sequence[float | None], better: str, printed: float | None, is_first: bool
) -> Compared:
    there = [value for value in values if value is not None]
    pairs = [] if is_first else _differences(values, base)
    sign = -1 if better == "lower" else 1
    wins = sum(sign * each > 0 for each in pairs), sum(sign * each < 0 for each in pairs)
    return {
        "values": list(values),
        "mean": mean(there) if there else None,
        "spread": max(there) - min(there) if there else None,
        "difference": mean(pairs) if pairs else None,
        "signs": wins,
        "p": sign_test(*wins),
        "printed": printed,
    }


def _differences(values: Sequence[float | None], base: Sequence[float | None]) -> list[float]:
    both = zip(values, base, strict=True)
    return [value - other for value, other in both if value is not None and other is not None]


def sign_test(wins: int, losses: int) -> float | None:
    """Return the two-sided p-value of so many wins and losses under equal odds; None without either."""
    n = wins + losses
    if n == 0:
        return None
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _verdict(plan: Plan, key: str, found: Mapping[str, Mapping[str, list[float | None]]]) -> Verdict | None:
    order = plan.study.order(key)
    sign = 1 if plan.study.measures[key].better == "lower" else -1
    says = []
    for better, worse in combinations(order, 2):
        for one in better:
            for other in worse:
                apart = (sign * each for each in _differences(found[other][key], found[one][key]))
                says.append({(each > 0) - (each < 0) for each in apart})
    if not says:
        return None
    return {
        "measure": key,
        "order": [list(group) for group in order],
        "holds": says.count({1}),
        "reversed": says.count({-1}),
        "mixed": sum(signs not in ({1}, {-1}) for signs in says),
    }


def _curve(jobs: Sequence[Job], stage: str | None) -> dict[int, float]:
    """Return step -> mean validation loss, at the steps that every seed has."""
    curves = []
    for job in jobs:
        lines = (line for line in read_metrics(RunFolder(job.measured.out).metrics) if line["stage"] == stage)
        curves.append({line["done"]: line["validation_loss"] for line in lines if line.get("validation_loss")})
    steps = set.intersection(*map(set, curves)) if curves else set[int]()
    return {step: mean(curve[step] for curve in curves) for step in sorted(steps)}


def _ranks(arms: Sequence[ArmResult], measure: str) -> Ranks:
    """Return the rank of every arm by a measure, as step 0, and by the mean loss at each step that all curves have."""
    steps = sorted(set.intersection(*(set(arm["curve"]) for arm in arms)))
    losses = {
        arm["arm"]: [arm["measures"][measure]["mean"] or 0.0, *(arm["curve"][step] for step in steps)] for arm in arms
    }
    columns = list(zip(*losses.values(), strict=True))
    return {
        "steps": [0, *steps],
        "of": {
            name: [1 + sum(other < own for other in column) for own, column in zip(of, columns, strict=True)]
            for name, of in losses.items()
        },
        "with_last": [rank_correlation(column, columns[-1]) for column in columns],
    }


def _flips(arms: Sequence[ArmResult], measures: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each pair whose order by the first measure is not that of the validation curves."""
    for one, other in combinations(arms, 2):
        steps = sorted(set(one["curve"]) & set(other["curve"]))
        start, other_start = (arm["measures"][measures[0]]["mean"] for arm in (one, other))
        if len(measures) < 2 or not steps or start is None or other_start is None or start == other_start:
            continue
        low, high = (one, other) if start < other_start else (other, one)
        ahead = [high["curve"][step] < low["curve"][step] for step in steps]
        if ahead[-1]:
            since = len(ahead) - next((n for n, each in enumerate(reversed(ahead)) if not each), len(ahead))
            yield f"{high['arm']} starts behind {low['arm']} and is ahead from step {steps[since]} on"
