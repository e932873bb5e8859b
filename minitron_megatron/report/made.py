"""A sentence for each finished stage on what it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from .. import numbers
from ..files import read_as
from ..run_folder import RunFolder

__all__ = ["StageRecord", "made", "made_by", "read_record"]

Result = Mapping[str, Any]


class StageRecord(TypedDict):
    """Fields of a stage's record that are shown."""

    seconds: float
    result: dict[str, object]


def read_record(run: RunFolder, stage: str) -> StageRecord | None:
    """Return a finished stage's record; None without one. Raises FileError where it is damaged."""
    path = run.record(stage)
    return read_as(path, StageRecord) if path.is_file() else None


def made_by(run: Path, stage: str) -> str:
    """Return what a finished stage made, in words; empty for a stage of a plugin, or one that is not done."""
    record = read_record(RunFolder(run), stage)
    return made(stage, record["result"]) if record else ""


def made(stage: str, result: Result) -> str:
    """Return a stage's result in words; empty for a stage of a plugin, or a result of another version."""
    try:
        return _WORDS["align" if stage.startswith("align-") else stage](result)
    except (LookupError, TypeError, ValueError, AttributeError):
        return ""


def _corpora(result: Result) -> str:
    sources = list(result["sources"].values())
    tokens, held_out = (sum(source[key] for source in sources) for key in ("tokens", "validation_tokens"))
    told = f"{numbers.count(tokens)} tokens" + (f", and {numbers.count(held_out)} held out" if held_out else "")
    return told + (f", of {len(sources)} sources" if len(sources) > 1 else "")


def _trained(result: Result) -> str:
    return f"trained on {numbers.count(result['tokens'])} tokens"


def _aligned(result: Result) -> str:
    unit = "tokens" if result["method"] == "sft" else "pairs"
    return f"{result['method']}, trained on {numbers.count(result['units'])} {unit}"


def _scored(result: Result) -> str:
    return f"scores over {numbers.count(result['samples'])} samples, {numbers.count(result['tokens'])} tokens"


def _searched(result: Result) -> str:
    how = "by hand" if result["by"] == "hand" else f"by {result['by']}"
    loss = "" if result["loss"] is None else f", loss {numbers.loss(result['loss'])}"
    return f"chose {result['winner']} {how} among {numbers.counted(result['candidates'], 'candidate')}{loss}"


def _pruned(result: Result) -> str:
    sizes = [f"{axis} {size}" for axis, size in result["rounds"][-1].items()]
    layers = [f"layers {len(result['layers'])}"] if result["layers"] else []
    return "kept " + ", ".join([*layers, *sizes])


def _evaluated(result: Result) -> str:
    return "loss " + ", ".join(f"{model} {numbers.loss(loss)}" for model, loss in result["loss"].items())


_WORDS: dict[str, Callable[[Result], str]] = {
    "prepare": _corpora,
    "calibrate": _corpora,
    "correct": _trained,
    "score": _scored,
    "search": _searched,
    "prune": _pruned,
    "distill": _trained,
    "align": _aligned,
    "baseline": _trained,
    "evaluate": _evaluated,
    "export": lambda result: f"weights in {result['dtype']}",
}
"""Stage -> writer of its result."""
