"""A rehearsed rank has the bytes and FLOPs of a real one, and shows what would fail on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from minitron_megatron.errors import TopologyError
from minitron_megatron.testing import Pool
from tests.rehearsal.planted import FAULTS, planted
from tests.rehearsal.steps import compiled_kernel, real, rehearsed, rehearsed_in_a_world, repeated

Call = Callable[..., Any]


def process() -> Iterator[Call]:
    """Yield a function that calls another one in a new process, which has rehearsed before and holds no less later."""
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        worker.submit(rehearsed, 0, 1, {}).result()
        yield lambda function, *args: worker.submit(function, *args).result()


rehearse = pytest.fixture(process, scope="module", name="rehearse")

LAYOUTS: dict[str, dict[str, Any]] = {
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "tp2": {"tp": 2, "sequence_parallel": True},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
}
"""Name -> layout of the ranks, in which `dp` is what a world of so many ranks leaves, and recomputation."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rehearsed_step_is_a_real_one(name: str, pool: Pool, rehearse: Call) -> None:
    """To the byte, on every rank: what is alive before a step of distillation and at its peak; FLOPs; what is sent."""
    layout = dict(LAYOUTS[name])
    recompute = layout.pop("recompute", "none")
    real_ranks = pool.run(real, recompute, **layout)
    for again in (pool.run(real, recompute, **layout) for _ in range(4 if "pp" in layout else 0)):
        for facts, other in zip(real_ranks, again, strict=True):  # gloo may hold what it sent a moment longer
            facts["peak"] = min(facts["peak"], other["peak"])
    layout.pop("dp", None)
    for rank, facts in enumerate(real_ranks):
        found = rehearse(rehearsed, rank, len(real_ranks), layout, recompute)
        assert {key: found[key] for key in facts} == facts
        assert bool(facts["sent"]) == (len(real_ranks) > 1)
        assert 0 <= found["peak"] - found["device"] < 1000  # on the host: step counters of the optimizer


def test_a_process_that_ran_on_the_cpu_is_refused(pool: Pool) -> None:
    with pytest.raises(
        TopologyError, match=r"^a rehearsal needs a process of its own, and this one has run on the CPU\. Start an"
    ):
        pool.run(rehearsed_in_a_world)


def test_an_operation_that_is_remembered_returns_what_it_did(rehearse: Call) -> None:
    expected = [2, 3, True, [0, 0, 12, 6], 0, 0, 1, torch.int64, torch.float32, True, 2, 3]
    assert rehearse(repeated) == [expected, expected]


def test_a_compiled_function_is_one_kernel_that_keeps_its_results_alone(rehearse: Call) -> None:
    """It reads 8 x 16 and 8 numbers, and writes 8 x 16 and 8."""
    assert rehearse(compiled_kernel) == [[{"compiled scaled": 1}, 4 * (2 * 8 * 16 + 2 * 8), 4 * 8, 4 * 8]] * 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, rehearse: Call) -> None:
    error = rehearse(planted, fault)
    assert FAULTS[fault] in error, error
