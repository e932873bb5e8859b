"""Exact numbers of rehearsed presets, which `benchmarks/rehearse_presets.py --golden` writes to presets.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_megatron.forecast import runs_of
from minitron_megatron.recipe import Recipe, load_recipe
from minitron_megatron.rehearsal import rehearse
from minitron_megatron.rehearsal.rehearse import RankResult
from tests.forecast.test_presets import CASES, GPUS, PRESETS, material_of

__all__ = ["NAMES", "first_rank", "numbers_of", "preset"]

NAMES = (*CASES, "minitron/8b", "minitron/4b")
"""Presets, and the students of the one that is a family."""


def preset(name: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a preset, or of a student of one; folder: for what it needs."""
    file, _, student = name.partition("/")
    runs = runs_of(load_recipe(PRESETS / f"{file}.yaml", [*material_of(file, folder), *overrides]))
    return next(run.planned for run in runs if run.until is None and student in ("", run.name))


def numbers_of(rank: RankResult) -> dict[str, Any]:
    """Return the numbers of a rank that a change of the product may change."""
    section = rank.section
    return {
        "peak_bytes": rank.peak,
        "peak_bytes_of_a_step": {name: int(size) for name, size in sorted(section.peak_by_kind.items()) if size},
        "flops": int(sum(section.flops.values())),
        "sent_bytes": {name: int(size) for name, size in sorted(section.sent.items())},
        "kernels": int(sum(section.kernels.values())),
    }


def first_rank(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Rehearse the first kind of rank of a preset; return its name and numbers."""
    with TemporaryDirectory() as folder:
        rank = rehearse(preset(name, Path(folder), overrides), gpus=GPUS, kinds=lambda kinds: kinds[:1]).ranks[0]
    return {rank.kind.name: numbers_of(rank)}
