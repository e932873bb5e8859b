"""Moments that refits of a teacher's cuts have in common: the same repairs, and the passes that they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from minitron_megatron.convert import load_hf
from minitron_megatron.errors import PlanError
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim
from minitron_megatron.refit import SharedMoments, SiteFit, refit, shared_sites
from minitron_megatron.refit.refit import _Run
from minitron_megatron.testing import Pool
from tests.tiny import SHAPE, samples, share

BATCHES = 4
CUTS: tuple[tuple[dict[str, Any], int, int], ...] = (
    ({"ffn": 40}, 5, 0),
    ({"ffn": 24, "layers": (0, 2)}, 2, 0),
    ({"heads": 4}, 10, 5),
    ({"heads": 4, "ffn": 40}, 10, 5),
    ({"layers": (1, 2)}, 0, 0),
)
"""Sizes of a student, and how many layers of it run in each micro-batch, without shared moments and with them."""


def both_ways(topology: Topology, folder: Path) -> list[list[tuple[list[SiteFit], int]]]:
    """For each cut: the repairs and how many layers ran, without shared moments and with them."""
    teacher, batches = load_hf(folder, topology, torch.float32), share(samples(16), topology, 16 // BATCHES)
    shared = SharedMoments(teacher, batches, topology, ("proj", "fc2"))
    found = []
    for sizes, *_ in CUTS:
        plan = random_plan(SHAPE, 3, **sizes)
        found.append([])
        for given in (None, shared):
            student = trim(load_hf(folder, topology, torch.float32), plan, topology)
            with patch.object(_Run, "_run", autospec=True, side_effect=_Run._run) as ran:
                fits = refit(student, teacher, plan, batches, topology, method="outputs", shared=given)
            found[-1].append((fits, ran.call_count))
    return found


def test_shared_moments_give_the_same_repairs_and_save_passes(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for (sizes, alone, spared), ((plain, first), (given, second)) in zip(
        CUTS, pool.run(both_ways, checkpoints["untied"])[0], strict=True
    ):
        assert (first, second) == (alone * BATCHES, spared * BATCHES), sizes
        repaired = [fit.name for fit in given if fit.ridge is not None]
        assert ("ffn" in sizes or "heads" in sizes) == bool(repaired)
        for one, other in zip(plain, given, strict=True):
            assert (one.name, one.ridge, one.tokens) == (other.name, other.ridge, other.tokens)
            assert other.calibration == pytest.approx(one.calibration, rel=1e-4)
            assert other.held_out == pytest.approx(one.held_out, rel=1e-4)


def wrong(topology: Topology, folder: Path, other: Path, count: int) -> None:
    models = [load_hf(each, topology, torch.float32) for each in (folder, other)]
    plan = random_plan(SHAPE, 3, ffn=40)
    shared = SharedMoments(models[1], share(samples(16), topology, 4)[:count], topology, ("fc2",))
    refit(trim(models[0], plan, topology), models[0], plan, share(samples(16), topology, 4), topology, shared=shared)


def test_moments_of_something_else_are_refused(pool: Pool, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"shared moments are another model's: it has layers 4 instead of 5, hidden 32"):
        pool.run(wrong, checkpoints["untied"], checkpoints["student"], 4)
    with pytest.raises(PlanError, match="shared moments are of other samples"):
        pool.run(wrong, checkpoints["untied"], checkpoints["untied"], 3)


def test_moments_are_shared_by_two_or_more() -> None:
    def sites(*students: dict[str, int]) -> tuple[str, ...]:
        return shared_sites("outputs", SHAPE, [SHAPE.resized(**sizes) for sizes in students])

    assert sites({"ffn": 40}) == () == sites({"hidden": 24, "ffn": 40}, {"hidden": 24, "ffn": 32})
    assert sites({"ffn": 40}, {"ffn": 32}, {"layers": 3}) == ("fc2",)
    assert sites({"heads": 4, "ffn": 40}, {"heads": 4}) == ("proj",)
    assert sites({"heads": 4}, {"heads": 2}, {"ffn": 40}, {"ffn": 32}) == ("proj", "fc2")
