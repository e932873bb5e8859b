"""A rehearsed rank has the bytes, FLOPs and traffic of a real one, and shows what would fail on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from tests.rehearsal.planted import FAULTS, planted
from tests.rehearsal.steps import on_cpu, rehearsed

Rehearse = Callable[..., Any]


@pytest.fixture(scope="module")
def rehearse() -> Iterator[Rehearse]:
    """Return a function that calls another one in a process that has not run on the CPU backend."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda function, *args, **options: process.submit(function, *args, **options).result()


CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("none", {}, 1),
    ("full", {}, 1),
    ("selective", {"tp": 2, "sequence_parallel": True}, 2),
    ("none", {"pp": 2}, 2),
    ("none", {"dp": 2}, 2),
)


@pytest.mark.parametrize(("recompute", "layout", "world"), CASES)
def test_a_rehearsed_step_is_a_real_one(
    recompute: str, layout: dict[str, Any], world: int, rehearse: Rehearse, pool: Pool
) -> None:
    """To the byte: what is alive before a step and at its peak; FLOPs; bytes of each collective."""
    real = pool.run(on_cpu, recompute, **layout)
    sizes = {key: value for key, value in layout.items() if key != "dp"}
    for rank in range(world):
        found = rehearse(rehearsed, rank, world, recompute, **sizes)
        facts = {key: found[key] for key in real[rank]}
        assert facts == real[rank]
        assert 0 <= found["peak"] - found["device"] < 1000  # of the host: optimizer's step counters, and scalars


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, rehearse: Rehearse) -> None:
    error = rehearse(planted, fault)
    assert FAULTS[fault] in error, error


def refused(topology: Topology) -> str:
    try:
        rehearsed(0, 1)
    except ValueError as error:
        return str(error)
    return ""


def test_a_process_that_ran_on_the_cpu_is_refused(pool: Pool) -> None:
    assert "needs a process of its own" in pool.run(refused)[0]
