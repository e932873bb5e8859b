"""A rehearsed rank has the bytes and FLOPs of a real one, and shows what would fail on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from minitron_megatron.errors import TopologyError
from tests.rehearsal.planted import FAULTS, planted
from tests.rehearsal.steps import on_cpu, rehearsed

Call = Callable[..., Any]


def process() -> Iterator[Call]:
    """Yield a function that calls another one in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


rehearse = pytest.fixture(process, scope="module", name="rehearse")
on_the_cpu = pytest.fixture(process, scope="module", name="on_the_cpu")


def test_a_rehearsed_step_is_a_real_one(rehearse: Call, on_the_cpu: Call) -> None:
    """To the byte: what is alive before a step of distillation and at its peak; and FLOPs."""
    real, found = on_the_cpu(on_cpu), rehearse(rehearsed, 0, 1)
    assert {key: found[key] for key in real} == real
    assert 0 <= found["peak"] - found["device"] < 1000  # on the host: step counters of the optimizer


def test_a_process_that_ran_on_the_cpu_is_refused(on_the_cpu: Call) -> None:
    with pytest.raises(TopologyError, match="needs a process of its own"):
        on_the_cpu(rehearsed, 0, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, rehearse: Call) -> None:
    error = rehearse(planted, fault)
    assert FAULTS[fault] in error, error
