"""What every test may ask for."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitron_megatron.testing import Pool
from tests.recipes import material, recipe_file

__all__ = ["material", "recipe_file"]

LONGEST = (
    "run/test_run.py",
    "slurm/test_slurm.py",
    "cli/test_faults.py",
    "run/test_tasks.py",
    "run/test_phases.py",
)
"""Of two processes that take a file at a time, none should begin one of these when the other is nearly done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and a threaded sum may add in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """The many collections that the tests cause need not look at what the ones before have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, shared by the whole session."""
    with Pool() as workers:
        yield workers


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints, tokenizers and texts that `MINITRON_TEST_ASSETS` names."""
    folder = os.environ.get("MINITRON_TEST_ASSETS")
    if not folder:
        pytest.skip("MINITRON_TEST_ASSETS names no folder of test assets")
    if not Path(folder).is_dir():
        pytest.fail(f"MINITRON_TEST_ASSETS is {folder}, which is no folder")
    return Path(folder)
